// Painting many points fast: straight into the pixels, as drawing calls for each would take a hundred times longer.

/** Colours of n groups, as 0xAABBGGRR, from the variables --hue-0 to --hue-9 of a style. */
export function hues(style, n) {
  return Uint32Array.from({ length: Math.max(1, n) }, (_, i) => packed(style.getPropertyValue(`--hue-${i % 10}`)));
}

/** Turn "#rrggbb" into the bits of a little-endian RGBA pixel. */
export function packed(color) {
  const rgb = parseInt(color.trim().slice(1), 16);
  return (0xff000000 | ((rgb & 0xff) << 16) | (rgb & 0xff00) | (rgb >> 16)) >>> 0;
}

const NO_GROUP = 0xff999999;

/** Side of a point in pixels, by how many there are. */
export function sideOf(n, ratio) {
  return Math.max(1, Math.round((n > 50_000 ? 1.5 : n > 5_000 ? 2.5 : n > 800 ? 4 : 6) * ratio));
}

/** By how many pixels each row of a disc falls short of its square at either end. */
export function discOf(side) {
  return Array.from({ length: side }, (_, row) => {
    const across = (side / 2) ** 2 - (row + 0.5 - side / 2) ** 2;
    return side < 4 ? 0 : Math.max(0, Math.round(side / 2 - Math.sqrt(Math.max(0, across))));
  });
}

/**
 * Paint discs of one size at places given by two scales, in device pixels.
 * @param context of a canvas
 * @param colors a packed colour a group
 */
export function paint(context, x, y, group, colors, toX, toY, ratio) {
  const { width, height } = context.canvas;
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const side = sideOf(x.length, ratio);
  const half = side >> 1;
  const inset = discOf(side);
  for (let i = 0; i < x.length; i++) {
    const left = Math.round(toX(x[i])) - half;
    const top = Math.round(toY(y[i])) - half;
    const color = group && group[i] < 0 ? NO_GROUP : colors[group ? group[i] % colors.length : 0];
    for (let row = Math.max(0, top); row < Math.min(height, top + side); row++) {
      const [from, to] = [Math.max(0, left + inset[row - top]), Math.min(width, left + side - inset[row - top])];
      if (from < to) pixels.fill(color, row * width + from, row * width + to);
    }
  }
  context.putImageData(image, 0, 0);
}

/** Whether a polygon of [x, y] contains a point: how often a ray to the right crosses it is odd. */
export function contains(polygon, x, y) {
  let inside = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [[ax, ay], [bx, by]] = [polygon[i], polygon[j]];
    if (ay > y !== by > y && x < ax + ((y - ay) / (by - ay)) * (bx - ax)) inside = !inside;
  }
  return inside;
}
