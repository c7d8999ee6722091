// What is shown, as the part of the address after #: "#target=12&k=20" can be sent to a colleague, and the back button works.

const VIEWS = ["overview", "targets", "target", "training", "train", "map", "findings", "about"];

/**
 * Read an address.
 * @param hash such as "#target=12&k=20"
 * @param counts {targets, train}: how many there are; an example beyond is answered by the list of all
 * @returns {view, index?, ...options}
 */
export function readRoute(hash, counts) {
  const pairs = [...new URLSearchParams(hash.replace(/^#/, ""))];
  if (!pairs.length) return { view: "overview" };
  const [[view, value], ...options] = pairs;
  if (!VIEWS.includes(view)) return { view: "overview" };
  const { index: _, ...known } = Object.fromEntries(options);
  const route = { ...known, view };
  if (view !== "target" && view !== "train") return route;
  const index = /^\d+$/.test(value) ? Number(value) : NaN;
  const count = view === "target" ? counts.targets : counts.train;
  return index < count ? { ...route, index } : { view: view === "target" ? "targets" : "training", missing: value };
}

/** Write an address; what is not given is left out. */
export function writeRoute({ view, index, ...options }) {
  const rest = Object.entries(options)
    .filter(([, value]) => value !== undefined && value !== null && value !== "")
    .map(([name, value]) => `&${name}=${encodeURIComponent(value)}`);
  return `#${view}${index === undefined ? "" : `=${index}`}${rest.join("")}`;
}
