// Many points on a canvas: zoomed by wheel, buttons and keys, picked by a click or a lasso.

import { ticks } from "d3-array";
import KDBush from "kdbush";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";

import { contains, hues, paint } from "../points.js";
import { scaleOf } from "../scales.js";

const PAD = { left: 46, right: 12, top: 12, bottom: 38 };
const BARE = { left: 8, right: 8, top: 8, bottom: 8 };
const NEAR = 14;

/**
 * A scatter plot.
 * @param x, y numbers, an entry a point
 * @param group an entry a point, which colour it has; null for one colour
 * @param groups names of the groups, in order
 * @param label what a screen reader says
 * @param describe function of a point to the text shown next to the pointer
 * @param onPick function of a point that was clicked
 * @param onSelect function of the points inside a lasso, or none; without it there is no lasso
 * @param thumbnail function (context, point, x, y, size) that draws a point's picture, where few points are in view
 * @param diagonal whether to draw where both axes agree
 */
export function Scatter({ x, y, group, groups, label, describe, onPick, onSelect, thumbnail, diagonal, xLabel, yLabel, height = 420 }) {
  const canvas = useRef(null);
  const [width, setWidth] = useState(600);
  const [view, setView] = useState(null);
  const [at, setAt] = useState(null);
  const [lassoing, setLassoing] = useState(false);
  const [lasso, setLasso] = useState(null);
  const [theme, setTheme] = useState(0);
  const drag = useRef(null);
  const index = useMemo(() => {
    const built = new KDBush(x.length);
    for (let i = 0; i < x.length; i++) built.add(x[i], y[i]);
    return built.finish();
  }, [x, y]);
  const whole = useMemo(() => extent(x, y, diagonal), [x, y, diagonal]);
  const shown = view ?? whole;
  const pad = xLabel ? PAD : BARE;
  const toX = scaleOf([shown[0], shown[2]], [pad.left, width - pad.right]);
  const toY = scaleOf([shown[1], shown[3]], [height - pad.bottom, pad.top]);

  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => setWidth(Math.max(240, Math.round(entry.contentRect.width))));
    watch.observe(canvas.current.parentElement);
    const query = matchMedia("(prefers-color-scheme: dark)");
    const turn = () => setTheme((n) => n + 1);
    query.addEventListener("change", turn);
    return () => {
      watch.disconnect();
      query.removeEventListener("change", turn);
    };
  }, []);

  useEffect(() => {
    // a view that is left loses its canvas before a frame asked for is called off
    const element = canvas.current;
    const style = getComputedStyle(element);
    const ratio = Math.min(2, devicePixelRatio || 1);
    element.width = width * ratio;
    element.height = height * ratio;
    const context = element.getContext("2d", { willReadFrequently: true });
    const frame = requestAnimationFrame(() => {
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, element.width, element.height);
      const inView = index.range(...shown);
      const pictures = thumbnail && inView.length <= 150;
      if (!pictures) paint(context, x, y, group, hues(style, groups?.length ?? 1), (v) => toX(v) * ratio, (v) => toY(v) * ratio, ratio);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      if (pictures) {
        const size = Math.max(14, Math.min(40, 0.6 * Math.sqrt((width * height) / Math.max(1, inView.length))));
        for (const point of inView) thumbnail(context, point, toX(x[point]) - size / 2, toY(y[point]) - size / 2, size);
      }
      context.strokeStyle = style.getPropertyValue("--soft");
      context.fillStyle = style.getPropertyValue("--soft");
      if (diagonal) {
        const [from, to] = [Math.max(shown[0], shown[1]), Math.min(shown[2], shown[3])];
        context.setLineDash([5, 4]);
        trace(context, [[toX(from), toY(from)], [toX(to), toY(to)]]);
        context.setLineDash([]);
      }
      if (xLabel) axes(context, shown, toX, toY, width, height, xLabel, yLabel, style);
      if (lasso?.length) {
        context.strokeStyle = style.getPropertyValue("--ink");
        context.lineWidth = 1.5;
        trace(context, [...lasso, lasso[0]].map(([a, b]) => [toX(a), toY(b)]));
      }
      if (at !== null) {
        context.strokeStyle = style.getPropertyValue("--ink");
        context.lineWidth = 2;
        context.beginPath();
        context.arc(toX(x[at]), toY(y[at]), 8, 0, 2 * Math.PI);
        context.stroke();
      }
    });
    return () => cancelAnimationFrame(frame);
  }, [x, y, group, width, height, view, at, lasso, theme]);

  const zoom = (times, cx = (shown[0] + shown[2]) / 2, cy = (shown[1] + shown[3]) / 2) => {
    const next = [cx + (shown[0] - cx) / times, cy + (shown[1] - cy) / times, cx + (shown[2] - cx) / times, cy + (shown[3] - cy) / times];
    const tooFar = next[2] - next[0] >= whole[2] - whole[0];
    setView(tooFar ? null : next);
  };
  const pan = (dx, dy) => setView([shown[0] + dx, shown[1] + dy, shown[2] + dx, shown[3] + dy]);
  const nearest = (event) => {
    const box = canvas.current.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const [dx, dy] = [Math.abs(toX.invert(px + NEAR) - toX.invert(px)), Math.abs(toY.invert(py + NEAR) - toY.invert(py))];
    const [cx, cy] = [toX.invert(px), toY.invert(py)];
    let best = null;
    let least = NEAR ** 2;
    for (const point of index.range(cx - dx, cy - dy, cx + dx, cy + dy)) {
      const distance = (toX(x[point]) - px) ** 2 + (toY(y[point]) - py) ** 2;
      if (distance < least) [best, least] = [point, distance];
    }
    return { point: best, place: [cx, cy] };
  };
  const down = (event) => {
    canvas.current.setPointerCapture(event.pointerId);
    const { place } = nearest(event);
    drag.current = { from: place, px: event.clientX, py: event.clientY, moved: false };
    if (lassoing || event.shiftKey) setLasso([place]);
  };
  const move = (event) => {
    const { point, place } = nearest(event);
    if (!drag.current) return setAt(point);
    drag.current.moved ||= Math.hypot(event.clientX - drag.current.px, event.clientY - drag.current.py) > 3;
    if (lasso && drag.current.moved) return setLasso([...lasso, place]);
    if (drag.current.moved && view) pan(drag.current.from[0] - place[0], drag.current.from[1] - place[1]);
  };
  const up = (event) => {
    const { point } = nearest(event);
    const wasMoved = drag.current?.moved;
    drag.current = null;
    if (lasso && wasMoved) {
      onSelect?.(Array.from(x.keys()).filter((i) => contains(lasso, x[i], y[i])));
      setLasso(null);
      setLassoing(false);
    } else {
      setLasso(null);
      if (!wasMoved && point !== null) onPick?.(point);
    }
  };
  const wheel = (event) => {
    // a page that scrolls past is not caught: one zooms with ctrl, after a click, or once zoomed
    if (!event.ctrlKey && !view && document.activeElement !== canvas.current) return;
    if (!view && event.deltaY > 0) return;
    event.preventDefault();
    const { place } = nearest(event);
    zoom(event.deltaY < 0 ? 1.25 : 0.8, ...place);
  };
  const keys = {
    "+": () => zoom(1.5),
    "=": () => zoom(1.5),
    "-": () => zoom(1 / 1.5),
    0: () => setView(null),
    ArrowLeft: () => view && pan((shown[0] - shown[2]) / 8, 0),
    ArrowRight: () => view && pan((shown[2] - shown[0]) / 8, 0),
    ArrowUp: () => view && pan(0, (shown[3] - shown[1]) / 8),
    ArrowDown: () => view && pan(0, (shown[1] - shown[3]) / 8),
  };
  const press = (event) => {
    if (!keys[event.key]) return;
    keys[event.key]();
    event.preventDefault();
    event.stopPropagation();
  };
  useEffect(() => {
    const element = canvas.current;
    element.addEventListener("wheel", wheel, { passive: false });
    return () => element.removeEventListener("wheel", wheel);
  });
  return (
    <div class="scatter">
      <div class="tools">
        <button type="button" onClick={() => zoom(1.5)} aria-label="Zoom in">+</button>
        <button type="button" onClick={() => zoom(1 / 1.5)} aria-label="Zoom out" disabled={!view}>−</button>
        <button type="button" onClick={() => setView(null)} disabled={!view}>Whole</button>
        {onSelect && (
          <button type="button" aria-pressed={lassoing} onClick={() => setLassoing(!lassoing)}>Lasso</button>
        )}
        <span class="soft told" aria-hidden="true">{at === null ? "" : describe(at)}</span>
      </div>
      <div class="canvas">
        <canvas
          ref={canvas}
          role="img"
          tabindex="0"
          aria-label={`${label} Keys: plus and minus zoom, arrows move, 0 shows all.`}
          style={{ height: `${height}px`, cursor: lassoing ? "crosshair" : at === null ? "default" : "pointer", touchAction: view || lassoing ? "none" : "pan-y" }}
          onPointerDown={down}
          onPointerMove={move}
          onPointerUp={up}
          onPointerLeave={() => setAt(null)}
          onPointerCancel={() => {
            drag.current = null;
            setLasso(null);
          }}
          onKeyDown={press}
        />
      </div>
      {groups && <Legend groups={groups} />}
    </div>
  );
}

function Legend({ groups }) {
  const most = 24;
  return (
    <ul class="legend" aria-label="Colours">
      {groups.slice(0, most).map((name, i) => (
        <li>
          <i style={{ background: `var(--hue-${i % 10})` }} /> {name}
        </li>
      ))}
      {groups.length > most && <li class="soft">and {groups.length - most} more</li>}
      {groups.length > 10 && <li class="soft">colours repeat after ten</li>}
    </ul>
  );
}

function extent(x, y, square) {
  let box = [Infinity, Infinity, -Infinity, -Infinity];
  for (let i = 0; i < x.length; i++) {
    if (!Number.isFinite(x[i]) || !Number.isFinite(y[i])) continue;
    if (x[i] < box[0]) box[0] = x[i];
    if (y[i] < box[1]) box[1] = y[i];
    if (x[i] > box[2]) box[2] = x[i];
    if (y[i] > box[3]) box[3] = y[i];
  }
  if (square) box = [Math.min(box[0], box[1]), Math.min(box[0], box[1]), Math.max(box[2], box[3]), Math.max(box[2], box[3])];
  const [dx, dy] = [0.03 * (box[2] - box[0] || 1), 0.03 * (box[3] - box[1] || 1)];
  return [box[0] - dx, box[1] - dy, box[2] + dx, box[3] + dy];
}

function trace(context, points) {
  context.beginPath();
  points.forEach(([a, b], i) => (i ? context.lineTo(a, b) : context.moveTo(a, b)));
  context.stroke();
}

function axes(context, shown, toX, toY, width, height, xLabel, yLabel, style) {
  context.font = `12px ${style.fontFamily}`;
  context.textBaseline = "middle";
  context.textAlign = "center";
  const text = (value) => String(Number(value.toFixed(6))).replace("-", "−");
  for (const value of ticks(shown[0], shown[2], width / 90)) context.fillText(text(value), toX(value), height - PAD.bottom + 12);
  context.textAlign = "right";
  for (const value of ticks(shown[1], shown[3], height / 70)) context.fillText(text(value), PAD.left - 6, toY(value));
  context.textAlign = "center";
  context.fillStyle = style.getPropertyValue("--ink");
  context.fillText(xLabel, (PAD.left + width) / 2, height - 8);
  context.save();
  context.translate(9, (height - PAD.bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.fillText(yLabel, 0, 0);
  context.restore();
}
