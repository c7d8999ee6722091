// What is odd about the data and the run: leaked copies, duplicates, suspected labels, and what verification found.

import { Numbers } from "../parts/figure.jsx";
import { usePage } from "../parts/page.js";
import { Example } from "../parts/picture.jsx";
import { counted, fixed, percent, plural, whole } from "../numbers.js";

export function Findings() {
  const { facts } = usePage().data;
  return (
    <section>
      <h2>Findings</h2>
      {facts.verification && <Verification />}
      {facts.leakage && <Pairs which="leakage" title="Leaked from training to test" first="train" second="test" parts={["train", "targets"]} />}
      {facts.duplicates && <Pairs which="duplicates" title={`Copies among ${plural(facts.nouns.train)}`} first="first" second="second" parts={["train", "train"]} />}
      {facts.suspects && <Suspects />}
      {facts.left_out.length > 0 && (
        <>
          <h3>Left out</h3>
          <ul>{facts.left_out.map(({ part, why, next }) => <li><b>{part}</b>: {why}{next && <>; <code>{next}</code></>}</li>)}</ul>
        </>
      )}
    </section>
  );
}

function Verification() {
  const { facts } = usePage().data;
  const { verdict, against, findings, when, old } = facts.verification;
  return (
    <section>
      <h3>Verification: <span class={verdict === "differs" ? "hurt" : "help"}>{verdict}</span></h3>
      <p class="soft">{against ? `Compared with ${against}` : "The run by itself"}{when ? `, ${when}` : ""}. {old && <b class="hurt">{old}</b>}</p>
      <div class="wide" tabindex="0" role="region" aria-label="Findings of verification">
        <table class="told-last">
          <thead><tr><th scope="col">level</th><th scope="col">check</th><th scope="col">passed</th><th scope="col">found</th></tr></thead>
          <tbody>
            {findings.map((row) => (
              <tr>
                <td>{row.level}</td>
                <th scope="row">{row.check}</th>
                <td>{row.passed ? "yes" : <b class="hurt">no</b>}</td>
                <td>{row.detail}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <Numbers name="verification" title="Verification" columns={["level", "check", "passed", "detail"]} rows={() => findings.map((row) => [row.level, row.check, row.passed, row.detail])} />
    </section>
  );
}

function Pairs({ which, title, first, second, parts }) {
  const { data } = usePage();
  const found = data.facts[which];
  const rows = found.rows;
  return (
    <section>
      <h3>{title}</h3>
      <p class="soft">{found.sentence}</p>
      <ul class="pairs">
        {rows.slice(0, 100).map((row) => (
          <li>
            <Example part={parts[0]} index={row[first]} size={72} />
            <Example part={parts[1]} index={row[second]} size={72} />
            <span class="soft">{row.same_label ? "" : "labels differ; "}distance {fixed(row.distance)}</span>
          </li>
        ))}
      </ul>
      {rows.length > 0 && <Numbers name={which} title={title} columns={Object.keys(rows[0])} rows={() => rows.map((row) => Object.values(row))} />}
    </section>
  );
}

function Suspects() {
  const { data } = usePage();
  const { rows } = data.facts.suspects;
  // where models say which label they would give, only another one is a reason to look
  const doubted = rows.filter((row) => (row.suggested === null ? row.score >= 0.5 : row.suggested !== row.label));
  return (
    <section>
      <h3>Labels to look at</h3>
      <p class="soft">
        {plural(data.facts.nouns.train)[0].toUpperCase() + plural(data.facts.nouns.train).slice(1)} whose label is believed least by models that were not trained on
        them, the most suspect first: a ranking, not a verdict.
        {doubted.length === 0 && " There is none: these models believe all labels."}
      </p>
      <ul class={data.facts.pictures?.train ? "grid" : "rows"}>
        {doubted.slice(0, 30).map((row) => (
          <li>
            <Example part="train" index={row.index} size={64} note={`suspicion ${fixed(row.score)}${row.suggested === null ? "" : `, models say ${row.suggested}`}`} />
          </li>
        ))}
      </ul>
      <Numbers name="suspects" title="Labels to look at" columns={Object.keys(rows[0] ?? {})} rows={() => rows.map((row) => Object.values(row))} />
    </section>
  );
}
