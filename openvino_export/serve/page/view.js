// SPDX-License-Identifier: Apache-2.0
// What is shown of the station.

import { find, make, partButton } from "./dialogs.js";
import { icon, kindOf, Stage, Strip } from "./pictures.js";
import { asScore, asTime, t } from "./texts.js";

export const IN_STRIP = 200;
const IN_LIST = 60;

/** What the page knows. */
export const now = {
  parts: [], // the last ones, the newest first
  bad: [], // the last ones called bad, some of them older
  picked: null, // number of the part that is looked at; null for the latest
  shown: null, // the part whose picture and verdict are seen
  loaded: null, // its picture
  since: 0, // when it came by itself
  said: null, // how it is judged after something was taught
  variants: {},
  sure: 0, // from so many good parts on a verdict is sure
  mode: { paused: false, learning_as: null },
  line: "connecting", // connecting, on, off
  drift: null, // the part that has shown it
  onlyBad: false,
  busy: false,
};

export const stage = new Stage(find("stage"));
const strip = new Strip(find("strip"), IN_STRIP, pick);

// What is shown

export const text = (id, content) => {
  if (find(id).textContent !== content) find(id).textContent = content;
};

export function drawState() {
  const { paused, learning_as: name } = now.mode;
  const count = now.variants[name]?.images ?? 0;
  let [kind, words, act] = [now.line, t(`state.${now.line}`), null];
  if (now.line === "on") {
    if (paused) [kind, words, act] = ["paused", t("state.paused"), "goOn"];
    else if (name !== null) {
      const key = count < now.sure ? "state.learning" : "state.learningSure";
      [kind, words] = ["learning", t(key, { name, count, more: now.sure - count })];
      act = "finish";
    } else if (now.drift) {
      [kind, words] = ["drift", t("state.drift", { name: now.drift.variant })];
      act = "seen";
    }
  }
  find("state").dataset.state = kind;
  text("state-text", words);
  const steps = kind === "learning" ? now.sure : 0;
  find("state-steps").replaceChildren(
    ...Array.from({ length: steps }, (_, i) => make("i", { className: i < count ? "done" : "" })),
  );
  find("state-act").hidden = !act;
  find("state-act").dataset.act = act;
  if (act) text("state-act", t(`state.${act}`));
  text("pause-text", t(paused ? "pause.goOn" : "pause.button"));
  find("pause").querySelector("use").setAttribute("href", paused ? "#i-go" : "#i-pause");
  const off = now.line !== "on" || now.busy;
  for (const id of ["undo", "pause", "new", "products", "teachings", "state-act"]) find(id).disabled = off;
  for (const id of ["good", "defect"]) find(id).disabled = off || !now.shown;
  document.body.classList.toggle("off", now.line === "off");
}

function drawVerdict() {
  const part = now.shown;
  const said = now.said ?? part;
  const kind = part ? kindOf(said) : "empty";
  find("verdict").dataset.kind = kind;
  find("verdict").classList.toggle("unsure", Boolean(part) && !said.is_sure);
  find("verdict-icon").replaceChildren(...(part ? [icon(kind)] : []));
  text("verdict-text", t(part ? `verdict.${kind}` : "part.none"));
  text("verdict-score", part ? `${t("verdict.score", { score: asScore(said.pred_score) })} · ${t("verdict.limit")}` : "");
  text("verdict-variant", said?.variant ? t("verdict.product", { name: said.variant }) : "");
  const notes = [];
  if (part && !said.is_sure) {
    const about = now.variants[said.variant];
    const isFew = about && !about.is_sure;
    notes.push(isFew ? t("verdict.unsureFew", { count: about.images, sure: now.sure }) : t("verdict.unsure"));
  }
  if (part?.learned_as && part.learned_as !== said.variant) notes.push(t("part.learnedAs", { name: part.learned_as }));
  if (now.said) {
    const told = { verdict: t(`verdict.${kindOf(part)}`), score: asScore(part.pred_score) };
    notes.push(t("verdict.before", told));
  }
  text("verdict-note", notes.join(" "));
}

function drawPart() {
  const part = now.shown;
  text("part-id", part ? t("part.id", { id: part.id }) : "");
  text("part-name", part?.part ?? "");
  text("part-time", part ? asTime(part.time) : "");
  const newer = part ? now.parts.filter((each) => each.id > part.id).length : 0;
  text("latest-text", newer ? t("part.newer", { count: newer }) : t("part.latest"));
  find("latest").classList.toggle("away", now.picked === null);
  find("stage").setAttribute("aria-label", part ? t("part.picture", { id: part.id }) : t("part.none"));
  text("stage-text", part ? (now.loaded ? "" : t("part.noPicture")) : t("part.noneHint"));
}

export function drawLists() {
  const shown = now.shown?.id ?? null;
  strip.show(now.parts, shown);
  const told = { count: now.parts.length, bad: now.parts.filter((part) => part.pred_label).length };
  text("strip-count", t("strip.count", told));
  find("strip").setAttribute("aria-label", t("strip.label", told));

  const row = find("thumbs");
  const listed = listedParts().slice(0, IN_LIST);
  const keys = new Set(listed.map((part) => `${part.id} ${part.time}`));
  for (const each of [...row.children]) if (!keys.has(each.dataset.key)) each.remove();
  let at = row.firstElementChild;
  for (const part of listed) {
    if (at?.dataset.key === `${part.id} ${part.time}`) at = at.nextElementSibling;
    else row.insertBefore(partButton(part, pick), at);
  }
  [...row.children].forEach((each, i) => {
    const isShown = listed[i]?.id === shown;
    each.setAttribute("aria-current", isShown);
    each.tabIndex = isShown || (i === 0 && !listed.some((part) => part.id === shown)) ? 0 : -1;
  });
  if (!listed.length && now.onlyBad) row.append(make("p", { className: "soft", textContent: t("list.none") }));
  find("filter").setAttribute("aria-pressed", now.onlyBad);
}

export function draw() {
  drawState();
  drawVerdict();
  drawPart();
  drawLists();
}

const listedParts = () => (now.onlyBad ? now.bad : now.parts);
export const partOf = (id) => [...now.parts, ...now.bad].find((part) => part.id === id) ?? null;

let isShowing = false;
/** Show the part that is wanted, verdict and picture at once; parts that come meanwhile are skipped. */
export async function show() {
  if (isShowing) return;
  isShowing = true;
  try {
    for (;;) {
      const wanted = now.picked === null ? (now.parts[0] ?? null) : partOf(now.picked);
      if (!wanted || (wanted.id === now.shown?.id && wanted.time === now.shown.time)) break;
      const { picked } = now;
      const loaded = await Stage.load(wanted.id).catch(() => null);
      if (now.picked !== picked) continue;
      Object.assign(now, { shown: wanted, loaded, said: null });
      if (now.picked === null) now.since = performance.now();
      stage.show(loaded);
      draw();
    }
  } finally {
    isShowing = false;
  }
}

export function pick(id) {
  now.picked = id;
  draw();
  show();
}

/** Show the next older (1) or newer (-1) part of the list. */
export function step(by) {
  const parts = listedParts();
  const from = now.picked ?? now.shown?.id ?? Infinity;
  const part = by > 0 ? parts.find((each) => each.id < from) : parts.findLast((each) => each.id > from);
  if (!part) return;
  pick(part.id);
  const button = find("thumbs").querySelector(`[data-key^="${part.id} "]`);
  button?.scrollIntoView({ inline: "nearest", block: "nearest" });
  if (document.activeElement.matches(".thumb")) button?.focus();
}

// What is told

/** Tell how something went; stays until the next message. `acts` are pairs of a text and what its button does. */
export function say(kind, words, ...acts) {
  const buttons = acts.map(([label, act]) => make("button", { className: "act", textContent: label, onclick: act }));
  const close = make("button", { className: "square quiet", onclick: () => find("message").replaceChildren() }, icon("i-close"));
  close.setAttribute("aria-label", t("say.drop"));
  const shapes = { ok: "good", warn: "unsure", error: "bad", busy: "i-busy" };
  const box = make("div", { className: kind }, icon(shapes[kind]), make("p", { textContent: words }));
  if (kind !== "busy") box.append(close, ...buttons);
  find("message").replaceChildren(box);
}
