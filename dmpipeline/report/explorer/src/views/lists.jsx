// Lists of examples to choose from: targets, and training examples.

import { useMemo, useState } from "preact/hooks";

import { usePage } from "../parts/page.js";
import { Example } from "../parts/picture.jsx";
import { counted, fixed, plural, signed, whole } from "../numbers.js";

const PAGE = 120;

export function Targets() {
  const { data, route, go } = usePage();
  const { facts, arrays } = data;
  const orders = [["index", "number"], ["hardest", facts.better ? "hardest first" : `least ${facts.output} first`]];
  if (arrays.target_lds) orders.push(["worst", "least LDS first"]);
  if (arrays.support) orders.push(["brittle", "most brittle first"]);
  const { q = "", label = "" } = route;
  const order = orders.some(([name]) => name === route.order) ? route.order : "hardest";
  const found = useMemo(() => data.ordered(order, data.found("targets", q, label)), [data, order, q, label]);
  const note = {
    index: () => undefined,
    hardest: (t) => `${facts.output} ${fixed(data.of("target_mean", t) ?? arrays.target_full[t], 1)}`,
    worst: (t) => `LDS ${fixed(data.of("target_lds", t))}`,
    brittle: (t) => (data.support(t) === null ? "does not flip" : data.support(t) === 0 ? "wrong as it is" : `flips at ${data.support(t)}`),
  }[order];
  const change = (options) => go({ view: "targets", order, q, label, ...options }, true);
  return (
    <section>
      <h2>{capital(plural(facts.nouns.targets))}</h2>
      <Missing part="targets" />
      <Choose part="targets" q={q} label={label} order={order} orders={orders} change={change} />
      <Found part="targets" found={found} note={note} />
    </section>
  );
}

export function Training() {
  const { data, route, go } = usePage();
  const { facts, arrays } = data;
  const orders = [["strongest", "most influence first"], ["index", "number"]];
  if (facts.suspects) orders.push(["suspect", "most suspect label first"]);
  const { q = "", label = "" } = route;
  const order = orders.some(([name]) => name === route.order) ? route.order : "strongest";
  const suspicion = useMemo(() => new Map((facts.suspects?.rows ?? []).map((row) => [row.index, row.score])), [data]);
  const found = useMemo(() => {
    const key = {
      index: (i) => i,
      strongest: (i) => -arrays.train_size[i],
      suspect: (i) => -(suspicion.get(i) ?? -1),
    }[order];
    return data.found("train", q, label).map((i) => [key(i), i]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, i]) => i);
  }, [data, order, q, label]);
  const note = {
    index: () => undefined,
    strongest: (i) => `all together ${signed(arrays.train_sum[i], 1)}`,
    suspect: (i) => (suspicion.has(i) ? `suspicion ${fixed(suspicion.get(i))}` : "not among the most suspect"),
  }[order];
  const change = (options) => go({ view: "training", order, q, label, ...options }, true);
  return (
    <section>
      <h2>{capital(plural(facts.nouns.train))}</h2>
      <Missing part="train" />
      <Choose part="train" q={q} label={label} order={order} orders={orders} change={change} />
      <Found part="train" found={found} note={note} />
    </section>
  );
}

function Missing({ part }) {
  const { data, route } = usePage();
  if (route.missing === undefined) return null;
  const n = part === "train" ? data.nTrain : data.nTargets;
  const where = part !== "train" && data.facts.target_numbers ? "this page holds some of them alone" : `numbers go from 0 to ${whole(n - 1)}`;
  return <p role="alert">There is no {data.facts.nouns[part]} {route.missing}; {where}.</p>;
}

function Choose({ part, q, label, order, orders, change }) {
  const { data } = usePage();
  const choices = data.choices(part);
  return (
    <div class="choose" role="search">
      <label>
        Find
        <input type="search" value={q} placeholder={data.facts.words ? "number, label or words" : "number or label"} onInput={(event) => change({ q: event.currentTarget.value })} />
      </label>
      {choices && (
        <label>
          Class
          <select value={label} onChange={(event) => change({ label: event.currentTarget.value })}>
            <option value="">all</option>
            {choices.map(({ value, name }) => <option value={value}>{name.length > 40 ? `${name.slice(0, 39)}…` : name}</option>)}
          </select>
        </label>
      )}
      <label>
        Order
        <select value={order} onChange={(event) => change({ order: event.currentTarget.value })}>
          {orders.map(([name, text]) => <option value={name}>{text}</option>)}
        </select>
      </label>
    </div>
  );
}

function Found({ part, found, note }) {
  const { data } = usePage();
  const [shown, setShown] = useState(PAGE);
  return (
    <>
      <p class="soft" aria-live="polite">{counted(found.length, data.facts.nouns[part])}</p>
      <ul class={data.facts.pictures?.[part] ? "grid" : "rows"}>
        {found.slice(0, shown).map((index) => (
          <li key={index}><Example part={part} index={index} size={64} note={note(index)} /></li>
        ))}
      </ul>
      {found.length > shown && (
        <button type="button" onClick={() => setShown(shown + 5 * PAGE)}>Show more</button>
      )}
    </>
  );
}

export function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}
