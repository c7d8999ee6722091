// Examples as people know them: a picture, a row of a table, a text, or only a number and a label.

import { usePage } from "./page.js";
import { signed } from "../numbers.js";

/** What an example is called: "test image 12, cat". */
export function nameOf(data, part, index) {
  const label = data.label(part, index);
  return `${data.facts.nouns[part]} ${data.number(part, index)}${label === null ? "" : `, ${label}`}`;
}

/** Where a part's picture lies: its sheet and place there; null where there is none. */
export function placeOf(facts, part, index) {
  const sheets = facts.pictures?.[part];
  if (!sheets) return null;
  const place = sheets.shown ? sheets.shown.indexOf(index) : index;
  if (place < 0) return null;
  const within = place % sheets.per_sheet;
  return {
    sheet: Math.floor(place / sheets.per_sheet),
    column: within % sheets.columns,
    row: Math.floor(within / sheets.columns),
  };
}

/** A thumbnail, for whatever says next to it what it is. */
export function Picture({ part, index, size = 56 }) {
  const { data } = usePage();
  const sheets = data.facts.pictures?.[part];
  const place = placeOf(data.facts, part, index);
  if (!place) return null;
  const times = size / Math.max(sheets.width, sheets.height);
  const [width, height] = [sheets.width * times, sheets.height * times];
  const rows = Math.ceil(Math.min(sheets.per_sheet, sheets.count - place.sheet * sheets.per_sheet) / sheets.columns);
  return (
    <span
      class={`picture sheet-${part}-${place.sheet}${sheets.width < 64 ? " pixels" : ""}`}
      aria-hidden="true"
      style={{
        width: `${width}px`,
        height: `${height}px`,
        backgroundSize: `${sheets.columns * width}px ${rows * height}px`,
        backgroundPosition: `${-place.column * width}px ${-place.row * height}px`,
      }}
    />
  );
}

/** A link to an example: its picture or words, its label and number, and a weight where one is meant. */
export function Example({ part, index, size, weight, note }) {
  const { data } = usePage();
  const label = data.label(part, index);
  const words = data.words(part, index);
  const href = data.address({ view: part === "train" ? "train" : "target", index });
  return (
    <a class={`example${data.facts.pictures?.[part] ? "" : " worded"}`} href={href}>
      <Picture part={part} index={index} size={size} />
      <span class="hidden">{data.facts.nouns[part]} </span>
      <span class="example-name">
        {label !== null && <b>{label}</b>} <span class="soft">no. {data.number(part, index)}</span>
      </span>
      {weight !== undefined && <span class={weight < 0 ? "weight hurt" : "weight help"}>{signed(weight)}</span>}
      {!data.facts.pictures?.[part] && words && <span class="words">{words}</span>}
      {note && <span class="soft note">{note}</span>}
    </a>
  );
}
