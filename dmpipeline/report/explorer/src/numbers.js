// Numbers as people read them: a true minus sign, a plus where a change is meant, a word where there is none.

const MINUS = "−";

/** A number with so many digits after the point; of a small one two digits that say something, of a large one three. */
export function fixed(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not known";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-6)) return value.toExponential(2).replaceAll("-", MINUS).replace("e+", "e");
  if (size > 0 && size < 5 * 10 ** -(digits + 1)) return String(Number(value.toPrecision(2))).replace("-", MINUS);
  return value.toFixed(digits).replace("-", MINUS);
}

/** A change, with its sign. */
export function signed(value, digits = 2) {
  const text = fixed(value, digits);
  return value > 0 ? `+${text}` : text;
}

export function whole(value) {
  return value === null || value === undefined ? "not known" : value.toLocaleString("en").replace("-", MINUS);
}

export function percent(share, digits = 0) {
  return share === null || share === undefined || Number.isNaN(share) ? "not known" : `${fixed(100 * share, digits)}%`;
}

/** "1 test image", "2 test images". */
export function counted(n, noun) {
  return `${whole(n)} ${n === 1 ? noun : plural(noun)}`;
}

export function plural(noun) {
  return `${noun}s`;
}

/** What a datamodel says of an output: "predicted margin"; of a model's prediction, which is foreseen itself. */
export function predicted({ output }) {
  return output === "prediction" ? "foreseen prediction" : `predicted ${output}`;
}

/** Rows as CSV by RFC 4180; a cell that a spreadsheet would run as a formula is made text. */
export function csv(columns, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined || Number.isNaN(value) ? "" : String(value);
    const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}
