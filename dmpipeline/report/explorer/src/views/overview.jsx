// The whole: how good the datamodels are, and where to look first.

import { useMemo, useState } from "preact/hooks";

import { Chart } from "../parts/charts.jsx";
import { Figure, Numbers } from "../parts/figure.jsx";
import { usePage } from "../parts/page.js";
import { Example, nameOf } from "../parts/picture.jsx";
import { Scatter } from "../parts/scatter.jsx";
import { histogram } from "../data.js";
import { counted, fixed, percent, plural, predicted, whole } from "../numbers.js";
import { line } from "../scales.js";

export function Overview() {
  const { facts, arrays } = usePage().data;
  return (
    <>
      <p class="lead" id="summary">{facts.summary}</p>
      {facts.models && <p id="models">{facts.models}</p>}
      <ul class="tiles">
        {facts.tiles.map(({ value, meaning }) => (
          <li class="tile"><b>{value}</b><span>{meaning}</span></li>
        ))}
      </ul>
      <Words />
      <Start />
      <div class="pair">
        {arrays.true && <PredictedAndTrue />}
        {facts.lds && <Scores />}
        {facts.curves.length > 0 && <LearningCurve />}
        {arrays.support && <SupportCurve />}
      </div>
      {facts.methods && <Methods />}
      {arrays.class_matrix && <ClassMatrix />}
    </>
  );
}

function Words() {
  const { facts } = usePage().data;
  return (
    <details class="words-used">
      <summary>The words on this page</summary>
      <dl>
        {facts.words_used.map(([word, meaning]) => (
          <>
            <dt>{word}</dt>
            <dd>{meaning}</dd>
          </>
        ))}
      </dl>
    </details>
  );
}

function Start() {
  const { data } = usePage();
  const { facts } = data;
  const all = useMemo(() => Array.from({ length: data.nTargets }, (_, i) => i), [data]);
  const leads = facts.better ? [["Hardest", data.ordered("hardest", all)[0]]] : [];
  if (facts.is_margin && data.arrays.support) {
    const brittle = data.ordered("brittle", all).find((t) => data.support(t) > 0);
    if (brittle !== undefined) leads.push([`Flips without ${counted(data.support(brittle), facts.nouns.train)}`, brittle]);
  }
  if (data.arrays.target_lds) leads.push(["Least foreseen by its datamodel", data.ordered("worst", all)[0]]);
  const [checked] = Object.entries(facts.retrained).sort(([, a], [, b]) => b.at(-1).k - a.at(-1).k);
  if (checked) leads.push(["Checked by retraining", Number(checked[0])]);
  return (
    <section>
      <h2>Where to look first</h2>
      <ul class="leads">
        {leads.map(([why, target]) => (
          <li>
            <Example part="targets" index={target} size={72} note={why} />
          </li>
        ))}
      </ul>
    </section>
  );
}

function PredictedAndTrue() {
  const { data, go } = usePage();
  const { facts, arrays } = data;
  const [colored, setColored] = useState("label");
  const [nSubsets, nTargets] = arrays.true.shape;
  const choices = [];
  if (data.choices()) choices.push(["label", "class"]);
  if (arrays.cluster_targets) choices.push(["cluster", "cluster"]);
  const by = choices.some(([name]) => name === colored) ? colored : choices[0]?.[0];
  const groups = useMemo(() => groupsOf(data, by), [data, by]);
  const group = useMemo(
    () => groups && Int32Array.from({ length: arrays.true.length }, (_, i) => groups.of[i % nTargets]),
    [groups],
  );
  return (
    <Figure
      title={facts.output === "prediction" ? "Predictions, foreseen and true" : `Predicted and true ${facts.output}s`}
      name="predicted-and-true"
      columns={["subset", facts.nouns.targets, "predicted", "true"]}
      rows={() => Array.from(arrays.true, (value, i) => [Math.floor(i / nTargets), data.number("targets", i % nTargets), arrays.predicted[i], value])}
      note={`A point is one of ${whole(nTargets)} ${plural(facts.nouns.targets)} on one of ${whole(nSubsets)} held-out subsets; true is the
        average of ${counted(facts.n_retrainings, "training")}. On the dashed line both agree. Click a point to see its ${facts.nouns.targets}.`}
    >
      {choices.length > 1 && (
        <label class="choice">
          Colour by{" "}
          <select value={by} onChange={(event) => setColored(event.currentTarget.value)}>
            {choices.map(([name, text]) => <option value={name}>{text}</option>)}
          </select>
        </label>
      )}
      <Scatter
        x={arrays.predicted}
        y={arrays.true}
        group={group}
        groups={groups?.names}
        diagonal
        height={380}
        label={`Scatter plot of predicted and true ${facts.output}s on held-out subsets.`}
        xLabel={predicted(facts)}
        yLabel={`true ${facts.output}`}
        describe={(i) => `${nameOf(data, "targets", i % nTargets)}: predicted ${fixed(arrays.predicted[i])}, true ${fixed(arrays.true[i])}`}
        onPick={(i) => go({ view: "target", index: i % nTargets })}
      />
    </Figure>
  );
}

/** Number the groups of targets by class or cluster: {of, names}; null where there are none. */
export function groupsOf(data, by, part = "targets") {
  if (by === "cluster") {
    const of = data.arrays[`cluster_${part}`];
    const n = of.reduce((most, value) => Math.max(most, value + 1), 0);
    return { of, names: Array.from({ length: n }, (_, i) => `cluster ${i}`) };
  }
  const labels = data.arrays[part === "train" ? "train_label" : "target_label"];
  if (by !== "label" || !labels) return null;
  const values = [...new Set(labels)].sort((a, b) => a - b);
  const place = new Map(values.map((value, i) => [value, i]));
  return {
    of: Int32Array.from(labels, (value) => place.get(value)),
    names: values.map((value) => String(data.facts.classes ? data.facts.classes[value] : value)),
  };
}

function Scores() {
  const { data } = usePage();
  const { facts, arrays } = data;
  const [picked, setPicked] = useState(null);
  const known = arrays.target_lds.filter((value) => !Number.isNaN(value));
  const low = Math.min(0, Math.floor(10 * known.reduce((a, b) => Math.min(a, b), 0)) / 10);
  const bins = useMemo(() => histogram(arrays.target_lds, low, 1, 30), [data]);
  const most = Math.max(1, ...bins.map(({ members }) => members.length));
  const marks = [["mean", facts.lds.lds, "mean"], ["ceiling", facts.lds.lds_ceiling, "ceiling"]].filter(([, value]) => value !== null);
  return (
    <Figure
      title={`LDS of each ${facts.nouns.targets}`}
      name="lds"
      columns={[facts.nouns.targets, "LDS", "ceiling"]}
      rows={() => Array.from(arrays.target_lds, (value, i) => [data.number("targets", i), value, arrays.target_ceiling?.[i]])}
      note={`LDS is the rank correlation of predicted and true ${facts.output}s over held-out subsets. Choose a bar to see whose it is.`}
    >
      <Chart label="Histogram of LDS" x={[low, 1]} y={[0, most * 1.3]} xLabel="LDS" yLabel={plural(facts.nouns.targets)} height={280}>
        {({ toX, toY, bottom, top }) => (
          <>
            {bins.map((bin) =>
              bin.members.length ? (
                <g
                  class={picked === bin ? "bar picked" : "bar"}
                  role="button"
                  tabindex="0"
                  aria-pressed={picked === bin}
                  aria-label={`LDS ${fixed(bin.from)} to ${fixed(bin.to)}: ${counted(bin.members.length, facts.nouns.targets)}`}
                  onClick={() => setPicked(picked === bin ? null : bin)}
                  onKeyDown={(event) => {
                    if (event.key !== "Enter" && event.key !== " ") return;
                    event.preventDefault();
                    setPicked(picked === bin ? null : bin);
                  }}
                >
                  <rect class="reach" x={toX(bin.from)} width={toX(bin.to) - toX(bin.from)} y={top} height={bottom - top} />
                  <rect x={toX(bin.from) + 1} width={toX(bin.to) - toX(bin.from) - 2} y={toY(bin.members.length)} height={bottom - toY(bin.members.length)} />
                </g>
              ) : null,
            )}
            {marks.map(([name, value, kind], i) => (
              <g class={`mark ${kind}`} aria-hidden="true">
                <line x1={toX(value)} x2={toX(value)} y1={top + 16 * i + 8} y2={bottom} />
                <text x={toX(value) - 6} y={top + 16 * i + 8} text-anchor="end">{`${name} ${fixed(value, 3)}`}</text>
              </g>
            ))}
          </>
        )}
      </Chart>
      {picked && (
        <div class="picked-list" aria-live="polite">
          <p>{`LDS ${fixed(picked.from)} to ${fixed(picked.to)}: ${counted(picked.members.length, facts.nouns.targets)}`}</p>
          <ul class="grid">
            {picked.members.slice(0, 60).map((target) => (
              <li><Example part="targets" index={target} note={`LDS ${fixed(arrays.target_lds[target])}`} /></li>
            ))}
          </ul>
        </div>
      )}
    </Figure>
  );
}

function LearningCurve() {
  const { facts } = usePage().data;
  const points = facts.curves.flatMap((curve) => curve.points);
  const counts = points.map((point) => point.n_models);
  const ceiling = facts.curves[0].lds_ceiling;
  const values = [...points.flatMap((p) => [p.lds_low, p.lds_high]), ceiling].filter((value) => value !== null);
  return (
    <Figure
      title="Learning curve"
      name="learning-curve"
      columns={["curve", "models", "LDS", "low", "high"]}
      rows={() => facts.curves.flatMap((c) => c.points.map((p) => [c.name, p.n_models, p.lds, p.lds_low, p.lds_high]))}
      note={`LDS of datamodels fitted on the first models of the run, with ${percent(facts.curves[0].level)} intervals.${facts.curves_remark}`}
    >
      <Chart
        label={facts.curves.map((c) => `${c.name}: LDS ${c.points.map((p) => `${fixed(p.lds, 3)} with ${whole(p.n_models)} models`).join(", ")}`).join(". ")}
        x={[Math.min(...counts), Math.max(...counts, Math.min(...counts) + 1)]}
        y={[Math.min(...values), Math.max(...values)]}
        logX
        xTicks={[...new Set(counts)].sort((a, b) => a - b)}
        xLabel="models fitted on"
        yLabel="LDS"
        height={280}
      >
        {({ toX, toY, left, right }) => (
          <>
            {ceiling !== null && (
              <g class="mark ceiling" aria-hidden="true">
                <line x1={left} x2={right} y1={toY(ceiling)} y2={toY(ceiling)} />
                <text x={left + 6} y={toY(ceiling) + 14}>{`ceiling ${fixed(ceiling, 3)}`}</text>
              </g>
            )}
            {facts.curves.map((curve, i) => (
              <g class={`curve curve-${i}`} aria-hidden="true">
                {curve.points.map((p) => (
                  <>
                    <line x1={toX(p.n_models)} x2={toX(p.n_models)} y1={toY(p.lds_low)} y2={toY(p.lds_high)} />
                    <circle cx={toX(p.n_models)} cy={toY(p.lds)} r="4" />
                  </>
                ))}
                <path d={line(curve.points.map((p) => [p.n_models, p.lds]), toX, toY)} />
                <text x={toX(curve.points.at(-1).n_models) - 6} y={toY(curve.points.at(-1).lds) + (i ? -12 : 18)} text-anchor="end">{curve.name}</text>
              </g>
            ))}
          </>
        )}
      </Chart>
    </Figure>
  );
}

function SupportCurve() {
  const { data, go } = usePage();
  const { facts } = data;
  const points = useMemo(() => data.supportCurve(), [data]);
  const most = Math.max(2, points.at(-1)?.[0] ?? 2);
  const half = points.find(([, share]) => share >= 0.5)?.[0];
  const certified = Object.values(facts.retrained).flat().some((dot) => dot.kind === "helper" && dot.k > 0);
  return (
    <Figure
      title="How many removals flip a prediction"
      name="support-curve"
      columns={[`${plural(facts.nouns.train)} removed`, "share that flips"]}
      rows={() => points}
      note={`Estimated: the share of ${plural(facts.nouns.targets)} that are predicted wrongly without so many of their strongest helpers, by their
        datamodels.${half !== undefined ? ` Half flip within ${whole(half)} of ${whole(data.nTrain)}.` : ""}${
          certified ? " Sets that were retrained are marked where their example is shown." : ""
        }`}
    >
      <Chart label={`Share of ${plural(facts.nouns.targets)} that flip within k removals`} x={[0, most]} y={[0, 1]} xLabel={`${plural(facts.nouns.train)} removed`} yLabel="flip" yFormat={(v) => percent(v)} height={280}>
        {({ toX, toY }) => (
          <g class="curve curve-0" aria-hidden="true">
            <path d={line([[0, points[0]?.[0] === 0 ? points[0][1] : 0], ...points, [most, points.at(-1)?.[1] ?? 0]], toX, toY, true)} />
          </g>
        )}
      </Chart>
      <p>
        <button type="button" onClick={() => go({ view: "targets", order: "brittle" })}>See the most brittle</button>
      </p>
    </Figure>
  );
}

function Methods() {
  const { facts } = usePage().data;
  const { columns, rows } = facts.methods;
  return (
    <section>
      <h2>Methods next to each other</h2>
      <p>
        Scores of other attributions on the same held-out models, of {facts.methods.when}. {facts.methods.old && <b class="hurt">{facts.methods.old}</b>}
      </p>
      <div class="wide" tabindex="0" role="region" aria-label="Methods">
        <table>
          <thead><tr>{columns.map((column) => <th scope="col">{column}</th>)}</tr></thead>
          <tbody>
            {rows.map(([name, ...cells]) => (
              <tr>
                <th scope="row">{name}</th>
                {cells.map((cell) => <td>{typeof cell === "number" ? fixed(cell, 3) : (cell ?? "")}</td>)}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <Numbers name="methods" columns={columns} rows={() => rows} title="Methods" />
    </section>
  );
}

function ClassMatrix() {
  const { data } = usePage();
  const { facts, arrays } = data;
  const names = facts.matrix_classes;
  const n = names.length;
  const most = arrays.class_matrix.reduce((top, value) => (Math.abs(value) > top ? Math.abs(value) : top), 0) || 1;
  const text = n <= 16;
  return (
    <section>
      <h2>Class by class</h2>
      <p>
        How much all {plural(facts.nouns.train)} of a class together change the {facts.output} of a {facts.nouns.targets}, on average: a row is the class
        of the {facts.nouns.train}, a column that of the {facts.nouns.targets}.{facts.matrix_note}
      </p>
      <div class="wide" tabindex="0" role="region" aria-label="Class by class influence">
        <table class={text ? "matrix" : "matrix small"}>
          <thead>
            <tr>
              <td />
              {names.map((name) => <th scope="col">{name}</th>)}
            </tr>
          </thead>
          <tbody>
            {names.map((name, i) => (
              <tr>
                <th scope="row">{name}</th>
                {names.map((_, j) => {
                  const value = arrays.class_matrix[i * n + j];
                  if (Number.isNaN(value)) return <td title={`no ${facts.nouns.targets} is of ${names[j]}`}>{text ? "–" : ""}</td>;
                  const shade = Math.round((100 * Math.abs(value)) / most);
                  return (
                    <td
                      title={`${name} on ${names[j]}: ${fixed(value)}`}
                      style={{ background: `color-mix(in srgb, var(${value < 0 ? "--hurt" : "--help"}) ${Math.round(0.38 * shade)}%, transparent)` }}
                    >
                      {text ? fixed(value, Math.abs(most) < 10 ? 2 : 1) : ""}
                    </td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <Numbers
        name="class-by-class"
        title="Class by class"
        columns={["training class", ...names]}
        rows={() => names.map((name, i) => [name, ...arrays.class_matrix.slice(i * n, (i + 1) * n)])}
      />
    </section>
  );
}
