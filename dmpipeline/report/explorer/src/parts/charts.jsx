// Charts of few marks, as SVG.

import { nice, ticks } from "d3-array";
import { useLayoutEffect, useRef, useState } from "preact/hooks";

import { scaleOf, ticksOf } from "../scales.js";

const LEFT = 52;
const RIGHT = 14;
const TOP = 12;
const BOTTOM = 40;

/** An SVG as wide as its place, with axes; children are drawn by a function of the scales. */
export function Chart({ label, x, y, xLabel, yLabel, height = 260, logX = false, xTicks, yFormat, children }) {
  const place = useRef(null);
  const [width, setWidth] = useState(420);
  useLayoutEffect(() => {
    const watch = new ResizeObserver(([entry]) => setWidth(Math.max(220, Math.round(entry.contentRect.width))));
    watch.observe(place.current);
    return () => watch.disconnect();
  }, []);
  const [low, high] = nice(y[0], y[1], 5);
  const toX = scaleOf(x, [LEFT, width - RIGHT], logX);
  const toY = scaleOf([low, high], [height - BOTTOM, TOP]);
  const across = (xTicks ?? ticksOf(x, width / 80, logX)).filter((_, i, all) => i % Math.ceil(all.length / (width / 42)) === 0);
  return (
    <div class="chart" ref={place}>
      <svg viewBox={`0 0 ${width} ${height}`} width={width} height={height} role="group" aria-label={label}>
        <g class="grid" aria-hidden="true">
          {ticks(low, high, 5).map((value) => (
            <g transform={`translate(0 ${toY(value)})`}>
              <line x1={LEFT} x2={width - RIGHT} />
              <text x={LEFT - 8} dy="0.32em" text-anchor="end">{yFormat ? yFormat(value) : readable(value)}</text>
            </g>
          ))}
          {across.map((value) => (
            <text x={toX(value)} y={height - BOTTOM + 18} text-anchor="middle">{readable(value)}</text>
          ))}
          <line class="base" x1={LEFT} x2={width - RIGHT} y1={height - BOTTOM} y2={height - BOTTOM} />
          <text class="axis" x={(LEFT + width - RIGHT) / 2} y={height - 4} text-anchor="middle">{xLabel}</text>
          <text class="axis" transform={`translate(12 ${(TOP + height - BOTTOM) / 2}) rotate(-90)`} text-anchor="middle">
            {yLabel}
          </text>
        </g>
        {children({ toX, toY, width, height, low, high, left: LEFT, right: width - RIGHT, top: TOP, bottom: height - BOTTOM })}
      </svg>
    </div>
  );
}

function readable(value) {
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-4)) return value.toExponential(1).replaceAll("-", "−").replace("e+", "e");
  const text = size >= 10000 ? `${Number((value / 1000).toFixed(1))}k` : String(Number(value.toFixed(6)));
  return text.replace("-", "−");
}
