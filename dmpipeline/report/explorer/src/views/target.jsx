// One target: whether it was right, who helps and who hurts, and what would be predicted without them.

import { useEffect, useMemo, useState } from "preact/hooks";

import { Chart } from "../parts/charts.jsx";
import { Figure } from "../parts/figure.jsx";
import { usePage } from "../parts/page.js";
import { Example, Picture, nameOf } from "../parts/picture.jsx";
import { Features } from "../parts/features.jsx";
import { counted, fixed, percent, plural, predicted, signed, whole } from "../numbers.js";
import { line } from "../scales.js";
import { capital } from "./lists.jsx";

export function Target() {
  const { data, route } = usePage();
  const { facts, arrays } = data;
  const t = route.index;
  const label = data.label("targets", t);
  const words = data.words("targets", t);
  return (
    <article>
      <Steps index={t} count={data.nTargets} view="target" noun={facts.nouns.targets} />
      <div class="subject">
        {facts.pictures?.targets && <Picture part="targets" index={t} size={176} />}
        <div>
          <h2>
            {capital(facts.nouns.targets)} {data.number("targets", t)}
            {label !== null && <>, labelled <span class="label">{label}</span></>}
          </h2>
          {words && <p class="words">{words}</p>}
          <Verdict target={t} />
          <dl class="facts">
            <Fact name={`${facts.output}, average over held-out models`} value={fixed(data.of("target_mean", t))} />
            <Fact name={`${facts.output} on the full training set, estimated`} value={fixed(arrays.target_full[t])} />
            {arrays.target_lds && <Fact name="LDS of its datamodel" value={withCeiling(data, t)} />}
            {arrays.support && <Fact name="flips without" value={flips(data, t)} />}
            {arrays.cluster_targets && arrays.cluster_targets[t] >= 0 && <Fact name="cluster" value={arrays.cluster_targets[t]} />}
          </dl>
        </div>
      </div>
      {isBare(data, t) ? (
        <p>
          This {facts.nouns.targets} is without weights: no {facts.nouns.train} has one in its datamodel, which says the same whichever are left out.
          More models may show some.
        </p>
      ) : (
        <>
          <Removal key={t} target={t} />
          <Influences target={t} kind="helper" />
          <Influences target={t} kind="harmer" />
        </>
      )}
      {arrays.targets_features && <Compared target={t} />}
      {arrays.true && <Foreseen target={t} />}
    </article>
  );
}

/** Links to the example before and after; also the arrow keys. */
export function Steps({ index, count, view, noun }) {
  const { data, go } = usePage();
  const part = view === "train" ? "train" : "targets";
  useEffect(() => {
    const press = (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea, canvas, [role=region]")) return;
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step && index + step >= 0 && index + step < count) go({ view, index: index + step });
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });
  return (
    <nav class="steps" aria-label={`Other ${plural(noun)}`}>
      {index > 0 ? <a href={data.address({ view, index: index - 1 })}>← no. {data.number(part, index - 1)}</a> : <span />}
      <span class="soft no-touch">arrow keys, too</span>
      {index < count - 1 ? <a href={data.address({ view, index: index + 1 })}>no. {data.number(part, index + 1)} →</a> : <span />}
    </nav>
  );
}

export function Fact({ name, value }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}

function isBare(data, t) {
  return data.arrays.helper_total[t] + data.arrays.harmer_total[t] === 0;
}

function withCeiling(data, t) {
  if (isBare(data, t)) return "none: without weights it says the same of all subsets";
  const ceiling = data.of("target_ceiling", t);
  const lds = data.of("target_lds", t);
  if (lds === null) return "not defined: its output never varies";
  return `${fixed(lds)}${ceiling === null ? "" : ` of at most ${fixed(ceiling)}`}`;
}

function flips(data, t) {
  const noun = data.facts.nouns.train;
  const dot = data.retrained(t, "helper").find(({ k, high }) => k > 0 && high < 0);
  if (dot) return `its ${counted(dot.k, `strongest ${noun}`)}, certified by ${counted(dot.n, "retraining")}`;
  if (isBare(data, t)) return "not known: it is without weights";
  const size = data.support(t);
  const basis = "estimated from the full training set";
  if (size === 0) return `nothing: wrong as it is, ${basis}`;
  return size === null ? `no set of its helpers, ${basis}` : `its ${counted(size, `strongest ${noun}`)}, ${basis}`;
}

function Verdict({ target }) {
  const { data } = usePage();
  const right = data.isRight(target);
  if (right === null) return null;
  const basis = data.of("target_mean", target) === null ? "by its datamodel" : "by the average held-out model";
  return <p class={right ? "verdict right" : "verdict wrong"}>{right ? "✓ predicted rightly" : "✗ predicted wrongly"} <span class="soft">{basis}</span></p>;
}

function Removal({ target }) {
  const { data, route, go } = usePage();
  const { facts, arrays } = data;
  const kind = route.of === "harmer" ? "harmer" : "helper";
  const steps = useMemo(() => data.stepsOf(target, kind), [data, target, kind]);
  const asked = Number(route.k ?? 0);
  const place = Math.max(0, steps.findLastIndex((step) => step <= asked));
  const k = steps[place];
  const value = data.predicted(target, kind, k);
  const dots = data.retrained(target, kind);
  const points = steps.map((step) => [step, data.predicted(target, kind, step)]);
  const [low, high] = [data.of("target_low", target), data.of("target_high", target)];
  const values = [...points.map(([, v]) => v), ...dots.flatMap((dot) => [dot.low ?? dot.mean, dot.high ?? dot.mean])];
  if (low !== null) values.push(low, high);
  if (facts.is_margin) values.push(0);
  const flip = kind === "helper" && facts.is_margin ? data.support(target) : null;
  const most = Math.max(1, steps.at(-1));
  const show = (next, of = kind) => go({ view: "target", index: target, k: next || undefined, of: of === "harmer" ? of : undefined }, true);
  const spoken = `${counted(k, facts.nouns.train)} removed: ${predicted(facts)} ${fixed(value)}`;
  return (
    <section>
      <h3>Without its strongest {data.kinds[kind].many}</h3>
      <div class="choose">
        <label class="grow">
          <span>
            Remove the first <output>{whole(k)}</output>
          </span>
          <input
            type="range"
            min="0"
            max={steps.length - 1}
            step="1"
            value={place}
            aria-valuetext={spoken}
            onInput={(event) => show(steps[Number(event.currentTarget.value)])}
          />
        </label>
        <label>
          of its
          <select value={kind} onChange={(event) => show(0, event.currentTarget.value)}>
            <option value="helper">{data.kinds.helper.many}</option>
            <option value="harmer">{data.kinds.harmer.many}</option>
          </select>
        </label>
      </div>
      <p class="answer" aria-live="polite">
        {capital(predicted(facts))} <b>{fixed(value)}</b>{k > 0 && <>, {signed(value - arrays.target_full[target])} from the full set</>}
        {facts.is_margin && value < 0 && arrays.target_full[target] > 0 && <>: <b class="hurt">the prediction flips</b></>}
        {flip > 0 && value >= 0 && <>; by the estimate it flips at {whole(flip)}</>}
        {nearestDot(dots, k)}
      </p>
      <Figure
        name={`removal-${facts.targets}-${target}`}
        title=""
        columns={["removed", predicted(facts), "measured", "low", "high", "retrainings"]}
        rows={() => points.map(([step, v]) => { const dot = dots.find((d) => d.k === step); return [step, v, dot?.mean, dot?.low, dot?.high, dot?.n]; })}
        note={<Note target={target} kind={kind} k={k} low={low} dots={dots} />}
      >
        <Chart label={spoken} x={[0, most]} y={[Math.min(...values), Math.max(...values)]} xLabel={`${plural(facts.nouns.train)} removed`} yLabel={facts.output} height={280}>
          {({ toX, toY, left, right, top, bottom }) => (
            <g aria-hidden="true">
              {low !== null && <rect class="band" x={left} width={right - left} y={toY(high)} height={Math.max(1, toY(low) - toY(high))} />}
              {facts.is_margin && (
                <g class="mark zero">
                  <line x1={left} x2={right} y1={toY(0)} y2={toY(0)} />
                  <text x={right - 4} y={toY(0) + (toY(0) > bottom - 20 ? -7 : 14)} text-anchor="end">wrong below</text>
                </g>
              )}
              {flip > 0 && flip <= most && (
                <g class="mark ceiling">
                  <line x1={toX(flip)} x2={toX(flip)} y1={top} y2={bottom} />
                  <text x={toX(flip) + (flip > most / 2 ? -6 : 6)} y={top + 10} text-anchor={flip > most / 2 ? "end" : "start"}>{`flips at ${whole(flip)}`}</text>
                </g>
              )}
              <g class="curve curve-0"><path d={line(points, toX, toY)} /></g>
              {dots.map((dot) => (
                <g class="dot">
                  {dot.low !== null && <line x1={toX(dot.k)} x2={toX(dot.k)} y1={toY(dot.low)} y2={toY(dot.high)} />}
                  <circle cx={toX(dot.k)} cy={toY(dot.mean)} r="5" />
                </g>
              ))}
              <line class="now" x1={toX(k)} x2={toX(k)} y1={top} y2={bottom} />
              <circle class="now" cx={toX(k)} cy={toY(value)} r="6" />
            </g>
          )}
        </Chart>
      </Figure>
    </section>
  );
}

function Note({ target, kind, k, low, dots }) {
  const { data } = usePage();
  const { facts } = data;
  const order = kind === "helper" ? "" : " --order harmful";
  const share = facts.alpha ? percent(facts.alpha) : "a part";
  const removable = Math.min(k || 20, data.arrays[`${kind}_total`][target]);
  return (
    <>
      The line is estimated by the datamodel.
      {low !== null && ` The band is what held-out models said, each trained on ${share} of the training set: below and above it, the line extrapolates.`}
      {dots.length > 0 && ` Points are models that were trained without these examples, with ${percent(facts.level)} intervals.`}
      {dots.length === 0 && facts.run && removable > 0 && (
        <> Nothing was retrained for this {facts.nouns.targets} yet: <code>{`dmpipeline counterfactual ${facts.run} ${data.number("targets", target)} --remove-top ${removable}${order} --retrain 20${facts.options}`}</code></>
      )}
    </>
  );
}

function nearestDot(dots, k) {
  const dot = dots.find((each) => each.k === k);
  if (!dot) return null;
  const reach = dot.low === null ? "" : ` (${fixed(dot.low)} to ${fixed(dot.high)})`;
  return <>; measured <b>{fixed(dot.mean)}</b>{reach} in {counted(dot.n, "retraining")}</>;
}

function Influences({ target, kind }) {
  const { data } = usePage();
  const { facts } = data;
  const [shown, setShown] = useState(10);
  const rows = data.influences(target, kind);
  const total = data.arrays[`${kind}_total`][target];
  const stable = rows.some((row) => row.stable !== null);
  return (
    <section class={kind === "helper" ? "help-list" : "hurt-list"}>
      <h3>
        {data.kinds[kind].title} <span class="soft">{counted(total, facts.nouns.train)}{total > rows.length ? `, the first ${rows.length} listed` : ""}</span>
      </h3>
      <ul class={facts.pictures?.train ? "grid" : "rows"}>
        {rows.slice(0, shown).map((row) => (
          <li key={row.index}>
            <Example part="train" index={row.index} size={64} weight={row.weight} note={row.stable === null ? undefined : stability(row.stable)} />
          </li>
        ))}
      </ul>
      {rows.length > shown && <button type="button" onClick={() => setShown(rows.length)}>Show all {rows.length}</button>}
      {stable && <p class="soft small">Stable means that fits to either half of the models give the weight this sign.</p>}
    </section>
  );
}

function stability(halves) {
  return ["unstable", "in one half", "stable"][halves];
}

function Compared({ target }) {
  const { data } = usePage();
  const rows = [
    ["targets", target],
    ...data.influences(target, "helper").slice(0, 5).map(({ index }) => ["train", index]),
    ...data.influences(target, "harmer").slice(0, 5).map(({ index }) => ["train", index]),
  ];
  return <Features rows={rows} title="Its columns next to those of its helpers and harmers" name={`columns-${target}`} />;
}

function Foreseen({ target }) {
  const { data } = usePage();
  const { facts, arrays } = data;
  const [nSubsets, nTargets] = arrays.true.shape;
  const points = Array.from({ length: nSubsets }, (_, s) => [arrays.predicted[s * nTargets + target], arrays.true[s * nTargets + target]]).filter(
    (pair) => pair.every(Number.isFinite),
  );
  const ends = (values) => [Math.min(...values), Math.max(...values)];
  const x = ends(points.map(([a]) => a));
  const y = ends(points.map(([, b]) => b));
  const both = [Math.max(x[0], y[0]), Math.min(x[1], y[1])];
  return (
    <Figure
      title="Foreseen on held-out subsets"
      name={`foreseen-${target}`}
      columns={["subset", "predicted", "true"]}
      rows={() => points.map(([a, b], i) => [i, a, b])}
      note="A point is a subset that the datamodel had not seen. On the dashed line prediction and truth agree."
    >
      <Chart label={`Predicted and true ${facts.output}s of ${nameOf(data, "targets", target)}`} x={x} y={y} xLabel={predicted(facts)} yLabel={`true ${facts.output}`} height={260}>
        {({ toX, toY }) => (
          <g aria-hidden="true">
            {both[0] < both[1] && <line class="diagonal" x1={toX(both[0])} y1={toY(both[0])} x2={toX(both[1])} y2={toY(both[1])} />}
            {points.map(([a, b]) => <circle class="point" cx={toX(a)} cy={toY(b)} r="3.5" />)}
          </g>
        )}
      </Chart>
    </Figure>
  );
}
