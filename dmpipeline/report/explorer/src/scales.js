// From values to places: scales, round ticks, and the path of a line. Nothing is drawn here.

import { ticks } from "d3-array";

/** A linear or logarithmic scale from values to places. */
export function scaleOf([from, to], [start, end], log = false) {
  const f = log ? Math.log : (value) => value;
  const span = f(to) - f(from) || 1;
  const scale = (value) => start + ((f(value) - f(from)) / span) * (end - start);
  scale.invert = (place) => {
    const at = f(from) + ((place - start) / (end - start)) * span;
    return log ? Math.exp(at) : at;
  };
  return scale;
}

/** Round values at which to draw ticks; of a logarithmic scale, 1, 2 and 5 times powers of ten. */
export function ticksOf([from, to], count, log = false) {
  if (!log) return ticks(from, to, count);
  const found = [];
  for (let power = Math.floor(Math.log10(from)); 10 ** power <= to; power++)
    for (const times of [1, 2, 5]) {
      const value = times * 10 ** power;
      if (value >= from && value <= to) found.push(value);
    }
  return found;
}

/** A path through points; `stepped` holds each value up to the next. */
export function line(points, toX, toY, stepped = false) {
  return points
    .map(([x, y], i) => {
      const place = `${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`;
      if (i === 0) return `M${place}`;
      return stepped ? `H${toX(x).toFixed(1)}V${toY(y).toFixed(1)}` : `L${place}`;
    })
    .join("");
}
