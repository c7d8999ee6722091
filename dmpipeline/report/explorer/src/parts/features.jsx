// Columns of a table's examples next to each other.

import { Numbers } from "./figure.jsx";
import { usePage } from "./page.js";
import { nameOf } from "./picture.jsx";

/** A table of examples, given as [part, index], with a row a column of the data. */
export function Features({ rows, title, name }) {
  const { data } = usePage();
  const columns = data.facts.features;
  const values = rows.map(([part, index]) => data.features(part, index));
  const heads = rows.map(([part, index]) => nameOf(data, part, index));
  const readable = (value) => String(Number(value.toPrecision(4))).replace("-", "−");
  return (
    <section>
      <h3>{title}</h3>
      <div class="wide" tabindex="0" role="region" aria-label={title}>
        <table class="features">
          <thead>
            <tr>
              <th scope="col">column</th>
              {heads.map((head) => <th scope="col">{head}</th>)}
            </tr>
          </thead>
          <tbody>
            {columns.map((column, c) => (
              <tr>
                <th scope="row">{column}</th>
                {values.map((own) => <td>{readable(own[c])}</td>)}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <Numbers name={name} title={title} columns={["column", ...heads]} rows={() => columns.map((column, c) => [column, ...values.map((own) => own[c])])} />
    </section>
  );
}
