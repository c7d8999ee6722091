// Examples on a map by their datamodels: those that lean on the same training examples lie together.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";

import { Figure } from "../parts/figure.jsx";
import { usePage } from "../parts/page.js";
import { Example, nameOf, placeOf } from "../parts/picture.jsx";
import { Scatter } from "../parts/scatter.jsx";
import { counted, fixed, percent, plural, whole } from "../numbers.js";
import { groupsOf } from "./overview.jsx";

export function Map2() {
  const { data, go, route } = usePage();
  const { facts, arrays } = data;
  const parts = Object.keys(facts.maps);
  const part = parts.includes(route.of) ? route.of : parts[0];
  const { name, note } = facts.maps[part];
  const [x, y] = [arrays[`map_${part}_x`], arrays[`map_${part}_y`]];
  const choices = [];
  if (data.choices(part)) choices.push(["label", "class"]);
  if (part === "targets" && arrays.cluster_targets) choices.push(["cluster", "cluster"]);
  const [colored, setColored] = useState("label");
  const by = choices.some(([each]) => each === colored) ? colored : choices[0]?.[0];
  const groups = useMemo(() => groupsOf(data, by, part), [data, by, part]);
  const [selected, setSelected] = useState([]);
  const thumbnail = useThumbnails(part);
  const noun = facts.nouns[part];
  return (
    <section>
      <h2>Map</h2>
      <div class="choose">
        {parts.length > 1 && (
          <label>
            Show
            <select value={part} onChange={(event) => { setSelected([]); go({ view: "map", of: event.currentTarget.value }, true); }}>
              {parts.map((each) => <option value={each}>{plural(facts.nouns[each])}</option>)}
            </select>
          </label>
        )}
        {choices.length > 1 && (
          <label>
            Colour by
            <select value={by} onChange={(event) => setColored(event.currentTarget.value)}>
              {choices.map(([each, text]) => <option value={each}>{text}</option>)}
            </select>
          </label>
        )}
      </div>
      <Figure
        title=""
        name={`map-${part}`}
        columns={[noun, "label", "x", "y", ...(part === "targets" && arrays.cluster_targets ? ["cluster"] : [])]}
        rows={() => Array.from(x, (value, i) => [data.number(part, i), data.label(part, i), value, y[i], ...(part === "targets" && arrays.cluster_targets ? [arrays.cluster_targets[i]] : [])])}
        note={`${whole(x.length)} ${plural(noun)}, by ${name} of their datamodels' weights. ${note} Zoom in to see them; draw a lasso (or hold shift) to list some.`}
      >
        <Scatter
          key={part}
          x={x}
          y={y}
          group={groups?.of}
          groups={groups?.names}
          height={Math.min(620, Math.max(320, Math.round(0.7 * innerHeight)))}
          label={`Map of ${plural(noun)}.`}
          describe={(i) => nameOf(data, part, i)}
          onPick={(i) => go({ view: part === "train" ? "train" : "target", index: i })}
          onSelect={setSelected}
          thumbnail={thumbnail}
        />
      </Figure>
      {selected.length > 0 && (
        <section aria-live="polite">
          <h3>{counted(selected.length, noun)} selected</h3>
          <ul class={facts.pictures?.[part] ? "grid" : "rows"}>
            {selected.slice(0, 200).map((i) => <li key={i}><Example part={part} index={i} /></li>)}
          </ul>
        </section>
      )}
      {facts.clusters && part === "targets" && <Clusters />}
    </section>
  );
}

function useThumbnails(part) {
  const { data } = usePage();
  const sheets = data.facts.pictures?.[part];
  const images = useRef([]);
  const [, draw] = useState(0);
  useEffect(() => {
    images.current = (sheets?.urls ?? []).map((url) => {
      const image = new Image();
      image.onload = () => draw((n) => n + 1);
      image.src = url;
      return image;
    });
  }, [part]);
  if (!sheets) return null;
  return (context, point, left, top, size) => {
    const place = placeOf(data.facts, part, point);
    const image = place && images.current[place.sheet];
    if (!image?.complete) return;
    context.imageSmoothingEnabled = sheets.width >= 64;
    context.drawImage(image, place.column * sheets.width, place.row * sheets.height, sheets.width, sheets.height, left, top, size, (size * sheets.height) / sheets.width);
  };
}

function Clusters() {
  const { data } = usePage();
  const { facts, arrays } = data;
  const { rows, ari } = facts.clusters;
  return (
    <section>
      <h3>Clusters</h3>
      <p class="soft">
        By spectral clustering of the weights.
        {ari !== null && ` Fits to two halves of the models agree on them with an adjusted Rand index of ${fixed(ari)}.`}
      </p>
      {rows.map((row) => {
        const members = Array.from(arrays.cluster_targets.keys()).filter((t) => arrays.cluster_targets[t] === row.cluster);
        return (
          <details>
            <summary>
              Cluster {row.cluster}: {counted(row.size, facts.nouns.targets)}
              {row.purity !== null && row.label !== null && `, ${percent(row.purity)} of them ${row.label}`}
              {row.stability !== null && `, stability ${fixed(row.stability)}`}
            </summary>
            <ul class={facts.pictures?.targets ? "grid" : "rows"}>{members.slice(0, 120).map((t) => <li><Example part="targets" index={t} /></li>)}</ul>
          </details>
        );
      })}
    </section>
  );
}
