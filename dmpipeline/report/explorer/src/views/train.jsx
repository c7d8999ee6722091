// One training example: whom it helps and hurts, and what is odd about it.

import { usePage } from "../parts/page.js";
import { Example, Picture } from "../parts/picture.jsx";
import { Features } from "../parts/features.jsx";
import { Numbers } from "../parts/figure.jsx";
import { counted, fixed, plural, signed } from "../numbers.js";
import { Fact, Steps } from "./target.jsx";
import { capital } from "./lists.jsx";

export function Train() {
  const { data, route } = usePage();
  const { facts, arrays } = data;
  const i = route.index;
  const label = data.label("train", i);
  const leaning = data.leaning(i);
  const words = data.words("train", i);
  const suspect = facts.suspects?.rows.find((row) => row.index === i);
  const copies = [
    ...(facts.duplicates?.rows ?? []).filter((row) => row.first === i || row.second === i).map((row) => ["train", row.first === i ? row.second : row.first]),
    ...(facts.leakage?.rows ?? []).filter((row) => row.train === i).map((row) => ["targets", row.test]),
  ];
  return (
    <article>
      <Steps index={i} count={data.nTrain} view="train" noun={facts.nouns.train} />
      <div class="subject">
        {facts.pictures?.train && <Picture part="train" index={i} size={176} />}
        <div>
          <h2>
            {capital(facts.nouns.train)} {i}
            {label !== null && <>: <span class="label">{label}</span></>}
          </h2>
          {words && <p class="words">{words}</p>}
          <dl class="facts">
            <Fact name={`weights on all ${plural(facts.nouns.targets)} together`} value={signed(arrays.train_sum[i])} />
            <Fact name="weights that are not zero" value={counted(arrays.train_nonzero[i], facts.nouns.targets)} />
            {suspect && <Fact name="its label is suspect" value={`${fixed(suspect.score)} of 1${suspect.suggested === null ? "" : `; models say ${suspect.suggested}`}`} />}
          </dl>
          {copies.length > 0 && (
            <>
              <h3>Copies of it</h3>
              <ul class="grid">{copies.map(([part, index]) => <li><Example part={part} index={index} /></li>)}</ul>
            </>
          )}
        </div>
      </div>
      <section>
        <h3>Leaning on it</h3>
        <p class="soft">
          {leaning.length
            ? `${counted(leaning.length, facts.nouns.targets)} with this among the largest weights, the strongest first.`
            : `No ${facts.nouns.targets} has this among its largest weights.`}
        </p>
        {[["help-list", facts.better === "higher" ? "Helped" : "Raised", (w) => w > 0], ["hurt-list", facts.better === "higher" ? "Hurt" : "Lowered", (w) => w < 0]].map(([kind, title, keep]) => {
          const rows = leaning.filter(({ weight }) => keep(weight));
          return rows.length ? (
            <section class={kind}>
              <h4>{title} <span class="soft">{counted(rows.length, facts.nouns.targets)}</span></h4>
              <ul class={facts.pictures?.targets ? "grid" : "rows"}>
                {rows.slice(0, 60).map(({ index, weight }) => <li key={index}><Example part="targets" index={index} size={64} weight={weight} /></li>)}
              </ul>
            </section>
          ) : null;
        })}
        {leaning.length > 0 && (
          <Numbers name={`leaning-on-${i}`} title="Leaning on it" columns={[facts.nouns.targets, "label", "weight"]} rows={() => leaning.map(({ index, weight }) => [data.number("targets", index), data.label("targets", index), weight])} />
        )}
      </section>
      {arrays.train_features && <Features rows={[["train", i], ...leaning.slice(0, 6).map(({ index }) => ["targets", index])]} title="Its columns next to those that lean on it" name={`columns-train-${i}`} />}
    </article>
  );
}
