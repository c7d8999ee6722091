// The page: its data unpacked, the view that the address names, and what surrounds it.

import { render } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";

import { Data } from "./data.js";
import { Page } from "./parts/page.js";
import { arraysOf, bytesOf, inflate } from "./payload.js";
import { plural } from "./numbers.js";
import { About } from "./views/about.jsx";
import { Findings } from "./views/findings.jsx";
import { Targets, Training, capital } from "./views/lists.jsx";
import { Map2 } from "./views/map.jsx";
import { Overview } from "./views/overview.jsx";
import { Target } from "./views/target.jsx";
import { Train } from "./views/train.jsx";

const VIEWS = { overview: Overview, targets: Targets, target: Target, training: Training, train: Train, map: Map2, findings: Findings, about: About };

function App({ data }) {
  const { facts } = data;
  const [route, setRoute] = useState(() => data.route(location.hash));
  const later = useRef(0);
  const main = useRef(null);
  useEffect(() => {
    const follow = () => setRoute(data.route(location.hash));
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  const place = `${route.view} ${route.index ?? ""}`;
  const before = useRef(place);
  useEffect(() => {
    if (before.current === place) return;
    before.current = place;
    scrollTo(0, 0);
    main.current.focus({ preventScroll: true });
  }, [place]);
  const go = (next, inPlace = false) => {
    const address = data.address(next);
    clearTimeout(later.current);
    if (!inPlace) {
      location.hash = address;
      return;
    }
    setRoute(data.route(address));
    // a slider moves a hundred times a second, and browsers refuse that many changes of the address
    later.current = setTimeout(() => history.replaceState(null, "", address), 250);
  };
  const links = [
    ["overview", "Overview"],
    ["targets", capital(plural(facts.nouns.targets)), ["target"]],
    ["training", capital(plural(facts.nouns.train)), ["train"]],
    ...(Object.keys(facts.maps).length ? [["map", "Map"]] : []),
    ["findings", "Findings"],
    ["about", "How it was made"],
  ];
  const View = VIEWS[route.view] === Map2 && !Object.keys(facts.maps).length ? Overview : VIEWS[route.view];
  const page = useMemo(() => ({ data, route, go }), [data, route]);
  return (
    <Page.Provider value={page}>
      <a class="skip" href="#content" onClick={(event) => { event.preventDefault(); main.current.focus(); }}>Skip to the content</a>
      <header>
        <h1>{facts.title}</h1>
        {facts.warnings.length > 0 && (
          <div class="warning" id="warnings" role="alert">{facts.warnings.map((warning) => <p>{warning}.</p>)}</div>
        )}
        <nav class="views" aria-label="Views">
          {links.map(([view, text, also = []]) => (
            <a href={data.address({ view })} aria-current={route.view === view || also.includes(route.view) ? "page" : undefined}>{text}</a>
          ))}
        </nav>
      </header>
      <main id="content" data-view={place.trim()} ref={main} tabindex="-1"><View /></main>
      <footer>{facts.footer}</footer>
    </Page.Provider>
  );
}

/** Give each sheet of pictures a class of its own, and a URL that needs no network. */
function showSheets(facts) {
  const rules = [];
  for (const [part, sheets] of Object.entries(facts.pictures ?? {})) {
    sheets.urls = sheets.sheets.map((sheet) =>
      sheet.includes(".") ? sheet : URL.createObjectURL(new Blob([bytesOf(document.getElementById(sheet).textContent)], { type: sheets.type })),
    );
    sheets.urls.forEach((url, i) => rules.push(`.sheet-${part}-${i}{background-image:url("${url}")}`));
  }
  const style = document.createElement("style");
  style.textContent = rules.join("\n");
  document.head.append(style);
}

async function start() {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const arrays = arraysOf(await inflate(bytesOf(globalThis.dmpipelineNumbers ?? document.getElementById("numbers").textContent)), facts.arrays);
  showSheets(facts);
  const place = document.getElementById("page");
  place.textContent = "";
  render(<App data={new Data(facts, arrays)} />, place);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start().catch((error) => {
  document.getElementById("page").textContent = `This page could not be shown: ${error.message}. A browser from 2023 or later shows it.`;
  throw error;
});
