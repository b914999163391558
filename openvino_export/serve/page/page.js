// SPDX-License-Identifier: Apache-2.0
// The operator's page: what each button does, and what the station tells.

import { Cancelled, follow, get, person, post, roleOf } from "./api.js";
import * as dialogs from "./dialogs.js";
import { draw, drawLists, drawState, IN_STRIP, now, partOf, pick, say, show, stage, step, text } from "./view.js";
import { asRate, asScore, fillTexts, t } from "./texts.js";

const { find } = dialogs;
// A part that has come so shortly before a press may not be the one that was meant.
const JUST_COME = 700;

fillTexts(document);

function fail(error) {
  if (error instanceof Cancelled) {
    find("message").replaceChildren();
    return;
  }
  const place = dialogs.alertOnTop();
  if (place) place.textContent = t("say.failed", { error: error.message });
  else say("error", t("say.failed", { error: error.message }));
}
/** Do one thing at a time; what goes wrong is told. */
async function run(work) {
  if (now.busy || now.line !== "on") return;
  const focused = document.activeElement;
  now.busy = true;
  drawState();
  try {
    await work();
  } catch (error) {
    fail(error);
    if (error.status === undefined && !(error instanceof Cancelled)) throw error;
  } finally {
    now.busy = false;
    draw();
    if (document.activeElement === document.body) focused.focus();
  }
}

// Teaching

/** The part that a press means: it is held from then on. One that has just come must be meant a second time. */
function meantPart() {
  const part = now.shown;
  if (!part) return null;
  const isNew = now.picked === null && performance.now() - now.since < JUST_COME && now.parts.length > 1;
  pick(part.id);
  if (!isNew) return part;
  say("warn", t("act.changed", { id: part.id }));
  return null;
}

async function judgeAgain(id) {
  const said = await get(`parts/${id}/again`);
  if (now.shown?.id === id) now.said = said;
  return said;
}

const undoAct = (teaching) => [t("undo.button"), () => run(() => takeBack(teaching))];

async function learn(part, kind, more = {}) {
  const id = part.id;
  say("busy", t(`teach.${kind}_busy`, { id }));
  const verdict = kind === "good" ? "good" : "defective";
  const { teaching } = await post("feedback", { id, verdict, ...more });
  const said = await judgeAgain(id);
  const isRight = said.pred_label === (kind === "defect");
  const told = { id, score: asScore(said.pred_score) };
  if (!teaching) say("warn", t("teach.known", told));
  else say(isRight ? "ok" : "warn", t(`teach.${kind}_${isRight ? "done" : "still"}`, told), undoAct(teaching));
}

function good() {
  const part = meantPart();
  if (!part) return;
  run(async () => {
    try {
      await learn(part, "good");
    } catch (error) {
      if (!error.content?.would_pass) throw error;
      const { excess, would_pass: others } = error.content;
      find("message").replaceChildren();
      if (await dialogs.askAgain(part.id, excess, others)) await learn(part, "good", { confirm: true });
    }
  });
}

function defect() {
  const part = meantPart();
  if (!part) return;
  run(async () => {
    const where = await dialogs.askDefect(part.id, now.loaded);
    if (where) await learn(part, "defect", where);
  });
}

async function takeBack(teaching) {
  say("busy", t("undo.busy"));
  const taken = await post("undo", { number: teaching.number });
  say("ok", t("undo.done", { what: dialogs.describe(taken) }));
}

function undo() {
  run(async () => {
    const last = (await get("teachings")).find((line) => line.undoable);
    if (!last) return say("warn", t("undo.none"));
    const wanted = { title: t("undo.title"), text: dialogs.describe(last), yes: t("undo.yes") };
    if (await dialogs.ask(wanted)) await takeBack(last);
  });
}

// In a list that stays open, errors are told above it.
function inDialog(work) {
  return run(async () => {
    const place = dialogs.alertOnTop();
    if (place) place.textContent = "";
    await work();
  });
}

function showTeachings() {
  const takeBackHere = (line) =>
    inDialog(async () => {
      await takeBack(line);
      await dialogs.listTeachings(takeBackHere);
    });
  dialogs.showTeachings(takeBackHere).catch(fail);
}

// Products

const alike = (name) => name.normalize("NFKC").toLowerCase().replaceAll(/\s/g, "");

function newProduct() {
  run(async () => {
    let [name, hint] = ["", t("new.hint", { sure: now.sure })];
    for (let known = null; ; ) {
      const wanted = { title: t("new.title"), text: hint, label: t("new.name"), value: name, yes: t("new.start") };
      name = await dialogs.askName(wanted);
      if (!name) return;
      const found = Object.keys(now.variants).find((each) => alike(each) === alike(name));
      if (found === undefined || found === known) break;
      [name, known, hint] = [found, found, t("new.known", { name: found })];
    }
    await post("mode", { learning_as: name });
    say("ok", t("new.started", { name }));
  });
}

function finishNew() {
  run(async () => {
    const name = now.mode.learning_as;
    await post("mode", { learning_as: "" });
    const count = now.variants[name]?.images;
    if (count) say("ok", t("new.done", { name, count }));
    else say("warn", t("new.undone", { name }));
  });
}

/** Change a product as the list of them asks for. */
async function changeProduct(kind, name, value) {
  const path = `variants/${encodeURIComponent(name)}`;
  const yes = t(kind === "rate" ? "say.ok" : `products.${kind}`);
  let told;
  if (kind === "rate") {
    await post("thresholds", { variant: name, false_alarm_rate: value });
    told = t("products.rateSet", { name, rate: asRate(value) });
  } else if (kind === "rename") {
    const title = t("products.renameTitle", { name });
    const given = await dialogs.askName({ title, label: t("new.name"), value: name, yes });
    if (!given || given === name) return;
    await post(`${path}/rename`, { name: given });
    told = t("products.renamed", { name, new: given });
  } else if (kind === "merge") {
    const names = Object.keys(now.variants).filter((each) => each !== name);
    const into = await dialogs.askWhich({ title: t("products.mergeTitle", { name }), names, yes });
    if (!into) return;
    await post(`${path}/merge`, { into });
    told = t("products.merged", { name, into });
  } else {
    const wanted = { title: t("products.deleteTitle", { name }), text: t("products.deleteHint"), yes };
    if (!(await dialogs.ask(wanted))) return;
    await post(path, undefined, "DELETE");
    told = t("products.deleted", { name });
  }
  say("ok", told);
}

function showProducts() {
  const change = (...what) =>
    inDialog(async () => {
      try {
        await changeProduct(...what);
        now.variants = await get("variants");
      } finally {
        dialogs.listProducts(now.variants, change);
      }
    });
  dialogs.showProducts(now.variants, change);
}

function pause() {
  run(() => post("mode", { paused: !now.mode.paused }));
}

// What the station tells

function add(part) {
  const insert = (parts, count) => {
    const others = parts.filter((each) => each.id !== part.id);
    return [part, ...others].sort((one, other) => other.id - one.id).slice(0, count);
  };
  now.parts = insert(now.parts, IN_STRIP);
  if (part.pred_label) now.bad = insert(now.bad, IN_STRIP);
  if (part.drift) now.drift = part;
}

let isReading = false;
function onEvent(kind, content) {
  if (kind === "verdict") add(content);
  else if (kind === "mode") now.mode = content;
  else if (kind === "failed") say("error", t("say.failedPart", content));
  else {
    Object.assign(now, { variants: content.variants, drift: null });
    if (kind === "undone") now.said = null;
  }
  if (isReading) return;
  draw();
  show();
}

/** Read anew what is known, when there is a connection again. */
async function read() {
  isReading = true;
  Object.assign(now, { parts: [], bad: [], drift: null });
  if (!now.loaded) now.shown = null; // its picture may be had now
  try {
    const paths = [`parts?count=${IN_STRIP}`, `parts?count=${IN_STRIP}&anomalous=true`, "teachings?count=1", "info"];
    const [parts, bad, [taught], info] = await Promise.all(paths.map(get));
    for (const part of [...bad.reverse(), ...parts.reverse()]) add(part);
    if (taught && now.drift && now.drift.time < taught.time) now.drift = null;
    Object.assign(now, { variants: info.variants, sure: info.sure_images });
  } finally {
    isReading = false;
  }
  if (now.picked !== null && !partOf(now.picked)) now.picked = null;
  draw();
  show();
}

async function drawRole() {
  const role = await roleOf().catch(() => null);
  text("role-text", [t(`role.${role ?? "none"}`), person.who].filter(Boolean).join(" · "));
}

async function onLine(isOn) {
  now.line = isOn ? "connecting" : "off";
  draw();
  if (!isOn) return;
  drawRole();
  await read().catch(fail);
  if (now.line !== "connecting") return; // lost again
  now.line = "on";
  draw();
}

// Buttons and keys

const toLatest = () => {
  now.picked = null;
  draw();
  show();
};

find("good").addEventListener("click", good);
find("defect").addEventListener("click", defect);
find("undo").addEventListener("click", undo);
find("pause").addEventListener("click", pause);
find("new").addEventListener("click", newProduct);
find("products").addEventListener("click", showProducts);
find("teachings").addEventListener("click", showTeachings);
find("latest").addEventListener("click", toLatest);
find("state-act").addEventListener("click", (event) => STATE_ACTS[event.currentTarget.dataset.act]());
find("help").addEventListener("click", dialogs.showHelp);
find("role").addEventListener("click", () => dialogs.askPerson());
document.addEventListener("signed-in", drawRole);
find("filter").addEventListener("click", () => {
  now.onlyBad = !now.onlyBad;
  drawLists();
});
find("opacity").addEventListener("input", (event) => {
  stage.opacity = event.target.value / 100;
  stage.draw();
});

const STATE_ACTS = {
  goOn: pause,
  finish: finishNew,
  seen: () => {
    now.drift = null;
    drawState();
  },
};

const KEYS = {
  g: () => find("good").click(),
  d: () => find("defect").click(),
  u: () => find("undo").click(),
  p: () => find("pause").click(),
  "?": dialogs.showHelp,
  ArrowLeft: () => step(1),
  ArrowRight: () => step(-1),
  Escape: toLatest,
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input") && event.key.startsWith("Arrow")) return; // moves the slider
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || event.repeat && !event.key.startsWith("Arrow")) return;
  event.preventDefault();
  act();
});

draw();
follow(onEvent, onLine);
