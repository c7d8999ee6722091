// A plot with what it shows as a table and as CSV, for those who cannot see it or want its numbers.

import { useState } from "preact/hooks";

import { csv } from "../numbers.js";

const MOST_ROWS = 200;

/**
 * A figure.
 * @param title what it shows
 * @param name of the CSV, without its suffix
 * @param columns names of the table's columns
 * @param rows function that returns the rows, called when the table is opened or downloaded
 * @param note what a reader should know, below
 */
export function Figure({ title, name, columns, rows, note, children, level = 3 }) {
  const Heading = `h${level}`;
  return (
    <figure id={`figure-${name}`}>
      {title && <Heading class="figure-title">{title}</Heading>}
      {children}
      {note && <figcaption>{note}</figcaption>}
      <Numbers name={name} title={title} columns={columns} rows={rows} />
    </figure>
  );
}

/** The table and the download below a plot. */
export function Numbers({ name, title, columns, rows }) {
  const [open, setOpen] = useState(false);
  const called = title || name.replaceAll("-", " ");
  const all = open ? rows() : [];
  return (
    <div class="numbers">
      <details open={open} onToggle={(event) => setOpen(event.currentTarget.open)}>
        <summary>Table</summary>
        {open && (
          <div class="wide" tabindex="0" role="region" aria-label={`${called}: table`}>
            <table>
              <thead>
                <tr>{columns.map((column) => <th scope="col">{column}</th>)}</tr>
              </thead>
              <tbody>
                {all.slice(0, MOST_ROWS).map((row) => <tr>{row.map((value) => <td>{shown(value)}</td>)}</tr>)}
                {all.length > MOST_ROWS && (
                  <tr>
                    <td colspan={columns.length}>and {(all.length - MOST_ROWS).toLocaleString("en")} more, in the CSV</td>
                  </tr>
                )}
              </tbody>
            </table>
          </div>
        )}
      </details>
      <button type="button" class="quiet" onClick={() => save(`${name}.csv`, csv(columns, rows()))}>
        CSV<span class="hidden"> of {called}</span>
      </button>
    </div>
  );
}

function shown(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : String(value);
}

function save(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
