// SPDX-License-Identifier: Apache-2.0
// What is drawn: a part with its heat map and a box, the strip of scores, and thumbnails.

import { picture } from "./api.js";

const SHAPES = { good: "i-good", bad: "i-bad", unsure: "i-unsure", none: "i-unsure" };
const LOADING = 2; // thumbnails that are fetched at a time

/** How a verdict is shown: good, bad or none. */
export const kindOf = (said) => ({ true: "bad", false: "good" })[said.pred_label] ?? "none";

/** The shape of a verdict, which tells it without colors. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#${SHAPES[name] ?? name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

function color(element, name) {
  return getComputedStyle(element).getPropertyValue(name);
}

/** Size a canvas to its place on the screen, and return what draws on it, in pixels of the page. */
function context(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const draw = canvas.getContext("2d");
  draw.scale(scale, scale);
  return { draw, width, height };
}

/** A part with its heat map laid over. */
export class Stage {
  constructor(canvas) {
    this.canvas = canvas;
    this.opacity = 0.8;
    this.image = this.heat = this.box = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** Fetch picture and heat map of a part; nothing is drawn yet. */
  static async load(id) {
    const found = await Promise.all([picture(`parts/${id}/image`), picture(`parts/${id}/heat_map`)]);
    const [image, heat] = await Promise.all(found.map((each) => createImageBitmap(each.blob)));
    return { image, heat, size: [found[0].width, found[0].height] };
  }

  show(loaded) {
    Object.assign(this, { image: null, heat: null, box: null }, loaded);
    this.draw();
  }

  /** Where the picture is: its left, top, width and height on the canvas. */
  place(width, height) {
    const scale = Math.min(width / this.image.width, height / this.image.height);
    const [w, h] = [this.image.width * scale, this.image.height * scale];
    return [(width - w) / 2, (height - h) / 2, w, h];
  }

  draw() {
    const { draw, width, height } = context(this.canvas);
    if (!this.image || !width) return;
    const place = this.place(width, height);
    draw.imageSmoothingQuality = "high";
    draw.drawImage(this.image, ...place);
    draw.globalAlpha = this.opacity;
    if (this.opacity) draw.drawImage(this.heat, ...place);
    draw.globalAlpha = 1;
    if (this.box) {
      const [left, top, right, bottom] = this.box;
      const [x, y, w, h] = place;
      for (const [style, line] of [["#000", 5], ["#fff", 2.5]]) {
        draw.strokeStyle = style;
        draw.lineWidth = line;
        draw.strokeRect(x + left * w, y + top * h, (right - left) * w, (bottom - top) * h);
      }
    }
  }

  /** Let a box be drawn. */
  takeBoxes(onChange) {
    let start = null;
    const at = (event) => {
      const frame = this.canvas.getBoundingClientRect();
      const [x, y, w, h] = this.place(frame.width, frame.height);
      const share = [(event.clientX - frame.left - x) / w, (event.clientY - frame.top - y) / h];
      return share.map((value) => Math.min(1, Math.max(0, value)));
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (!this.image) return;
      start = at(event);
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!start) return;
      const end = at(event);
      this.box = [0, 1].map((i) => Math.min(start[i], end[i])).concat([0, 1].map((i) => Math.max(start[i], end[i])));
      this.draw();
      onChange();
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => (start = null));
  }

  /** The box in pixels of the image, null if there is none of at least a pixel. */
  boxInPixels() {
    if (!this.box) return null;
    const box = this.box.map((share, i) => Math.round(share * this.size[i % 2]));
    return box[2] > box[0] && box[3] > box[1] ? box : null;
  }
}

const MARGIN = { left: 40, right: 12, top: 8, bottom: 8 };

/** Scores of the last parts against the threshold, the newest at the right. */
export class Strip {
  constructor(canvas, count, onPick) {
    this.canvas = canvas;
    this.count = count;
    this.parts = [];
    this.shown = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    const pick = (event) => {
      const frame = canvas.getBoundingClientRect();
      const slot = (frame.width - MARGIN.left - MARGIN.right) / count;
      const place = Math.round((frame.right - MARGIN.right - event.clientX) / slot - 0.5);
      const part = this.parts[Math.min(this.parts.length - 1, Math.max(0, place))];
      if (part) onPick(part.id);
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pick(event);
    });
    canvas.addEventListener("pointermove", (event) => canvas.hasPointerCapture(event.pointerId) && pick(event));
  }

  show(parts, shown) {
    Object.assign(this, { parts, shown });
    this.draw();
  }

  draw() {
    const { draw, width, height } = context(this.canvas);
    if (!width) return;
    const slot = (width - MARGIN.left - MARGIN.right) / this.count;
    const level = (score) => MARGIN.top + (1 - score) * (height - MARGIN.top - MARGIN.bottom);
    const middle = level(0.5);
    draw.fillStyle = color(this.canvas, "--bad-soft");
    draw.fillRect(MARGIN.left, MARGIN.top, width - MARGIN.left - MARGIN.right, middle - MARGIN.top);
    draw.strokeStyle = draw.fillStyle = color(this.canvas, "--text-soft");
    draw.setLineDash([6, 4]);
    draw.beginPath();
    draw.moveTo(MARGIN.left, middle);
    draw.lineTo(width - MARGIN.right, middle);
    draw.stroke();
    draw.setLineDash([]);
    draw.font = `13px ${getComputedStyle(this.canvas).fontFamily}`;
    draw.textAlign = "right";
    draw.textBaseline = "middle";
    for (const value of ["1", "0.5", "0"]) {
      draw.fillText(value, MARGIN.left - 8, Math.min(height - 8, Math.max(8, level(Number(value)))));
    }
    this.parts.forEach((part, i) => {
      const x = width - MARGIN.right - (i + 0.5) * slot;
      const y = level(Math.min(1, Math.max(0, part.pred_score)));
      if (part.id === this.shown) {
        draw.fillStyle = color(this.canvas, "--accent");
        draw.fillRect(x - 1.5, 0, 3, height);
      }
      mark(draw, kindOf(part), part.is_sure, x, y, (name) => color(this.canvas, name));
    });
  }
}

/** A circle for good, a square on its corner for bad; hollow where it is not sure. */
function mark(draw, kind, isSure, x, y, colorOf) {
  draw.beginPath();
  if (kind === "good") draw.arc(x, y, 3, 0, 2 * Math.PI);
  else for (const [dx, dy] of [[0, -5.5], [5.5, 0], [0, 5.5], [-5.5, 0]]) draw.lineTo(x + dx, y + dy);
  draw.closePath();
  draw.fillStyle = colorOf(isSure ? `--${kind}` : "--surface");
  draw.strokeStyle = colorOf(`--${kind}`);
  draw.lineWidth = 1.5;
  draw.fill();
  draw.stroke();
}

const waiting = new Set();
let loading = 0;

/** A picture that is fetched once it is seen; its place is kept free. */
export function thumbnail(path) {
  const image = new Image();
  image.alt = "";
  image.dataset.path = path;
  seen.observe(image);
  return image;
}

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) waiting.add(target);
    else waiting.delete(target);
  }
  loadNext();
});

async function loadNext() {
  const image = waiting.values().next().value;
  if (!image || loading >= LOADING) return;
  waiting.delete(image);
  seen.unobserve(image);
  loading += 1;
  try {
    if (!image.isConnected) return;
    const { blob } = await picture(image.dataset.path);
    image.src = URL.createObjectURL(blob);
    await image.decode();
    URL.revokeObjectURL(image.src); // it is decoded, and holds its pixels
  } catch {
    image.classList.add("lost"); // no longer kept, or not connected
  } finally {
    loading -= 1;
    loadNext();
  }
}
