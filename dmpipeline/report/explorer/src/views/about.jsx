// How it was made, how it was fitted, and what it cost.

import { usePage } from "../parts/page.js";

export function About() {
  const { facts } = usePage().data;
  const known = facts.tables.filter(({ rows }) => rows.length);
  if (!known.length) return <p>How this was made is not recorded.</p>;
  return (
    <>
      <div class="pair">
        {known.map(({ heading, rows }) => (
          <section>
            <h2>{heading}</h2>
            <table class="about">
              <tbody>{rows.map(([name, value]) => <tr><th scope="row">{name}</th><td>{value}</td></tr>)}</tbody>
            </table>
          </section>
        ))}
      </div>
    </>
  );
}
