/* The settling canvas as a picture: an animated PNG, which every browser plays. */
"use strict";

const PICTURE = { width: 640, margin: 20, line: 26, font: "16px system-ui, sans-serif" };
const MAX_FRAMES = 64;

/* Where each token of a step stands: [text, x, line, opacity, changed], and the number of lines. */
function layOut(context, step, previous) {
  const right = PICTURE.width - PICTURE.margin, placed = [];
  const before = previous?.canvas === step.canvas ? previous.tokens : null;
  let x = PICTURE.margin, line = 0;
  step.pieces.forEach((piece, i) => {
    const shade = opacity(step.entropies[i]), changed = before !== null && before[i] !== step.tokens[i];
    piece.split("\n").forEach((part, n) => {
      if (n) { x = PICTURE.margin; line++; }
      const width = context.measureText(part).width;
      if (x + width > right && x > PICTURE.margin) { x = PICTURE.margin; line++; part = part.trimStart(); }
      placed.push([part, x, line, shade, changed]);
      x += context.measureText(part).width;
    });
  });
  return [placed, line + 1];
}

async function animation(steps) {
  const every = Math.ceil(steps.length / MAX_FRAMES);
  const shown = steps.map((step, i) => [step, steps[i - 1]]).filter((_, i) => i % every === 0 || i === steps.length - 1);
  const canvas = element(null, "canvas"), context = canvas.getContext("2d", { willReadFrequently: true });
  context.font = PICTURE.font;
  const frames = shown.map(([step, previous]) => layOut(context, step, previous));
  canvas.width = PICTURE.width;
  canvas.height = 2 * PICTURE.margin + PICTURE.line * Math.max(...frames.map(([, n]) => n));
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  const images = frames.map(([placed]) => {
    context.font = PICTURE.font;
    context.textBaseline = "middle";
    context.globalAlpha = 1;
    context.fillStyle = colour("--card");
    context.fillRect(0, 0, canvas.width, canvas.height);
    for (const [text, x, line, shade, changed] of placed) {
      const y = PICTURE.margin + PICTURE.line * line;
      context.globalAlpha = 0.42;
      context.fillStyle = colour("--changed");
      if (changed) context.fillRect(x, y + 3, context.measureText(text).width, PICTURE.line - 6);
      context.globalAlpha = shade;
      context.fillStyle = colour("--ink");
      context.fillText(text, x, y + PICTURE.line / 2);
    }
    return context.getImageData(0, 0, canvas.width, canvas.height);
  });
  return apng(images);
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

function crc(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC[(value ^ byte) & 255] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

/* A chunk: length, name, data, check sum. Numbers among the data are [value, bytes]. */
function chunk(name, ...data) {
  const bytes = [...data].flatMap((part) => part instanceof Uint8Array ? [part]
    : [Uint8Array.from({ length: part[1] }, (_, i) => part[0] >>> (8 * (part[1] - 1 - i)))]);
  const size = bytes.reduce((n, part) => n + part.length, 0), whole = new Uint8Array(12 + size);
  const view = new DataView(whole.buffer);
  view.setUint32(0, size);
  whole.set(new TextEncoder().encode(name), 4);
  let at = 8;
  for (const part of bytes) { whole.set(part, at); at += part.length; }
  view.setUint32(at, crc(whole.subarray(4, at)));
  return whole;
}

async function apng(images) {
  const { width, height } = images[0], parts = [Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10)];
  parts.push(chunk("IHDR", [width, 4], [height, 4], Uint8Array.of(8, 2, 0, 0, 0)));
  parts.push(chunk("acTL", [images.length, 4], [0, 4]));
  let number = 0;
  for (const [i, image] of images.entries()) {
    const last = i === images.length - 1;
    parts.push(chunk("fcTL", [number++, 4], [width, 4], [height, 4], [0, 4], [0, 4],
      [last ? 2500 : 120, 2], [1000, 2], Uint8Array.of(0, 0)));
    const data = await deflated(rows(image));
    parts.push(i ? chunk("fdAT", [number++, 4], data) : chunk("IDAT", data));
  }
  parts.push(chunk("IEND"));
  return new Blob(parts, { type: "image/png" });
}

/* Red, green, blue of each row, behind the number of its filter: 2, the difference to the row above. */
function rows({ width, height, data }) {
  const found = new Uint8Array(height * (1 + 3 * width));
  for (let y = 0, at = 0; y < height; y++) {
    found[at++] = 2;
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < 3; c++) {
        const here = 4 * (y * width + x) + c;
        found[at++] = data[here] - (y ? data[here - 4 * width] : 0);
      }
    }
  }
  return found;
}

async function deflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
