// SPDX-License-Identifier: Apache-2.0
// What the page asks and lists in dialogs.

import { get, onPinNeeded, person, roleOf } from "./api.js";
import { icon, kindOf, Stage, thumbnail } from "./pictures.js";
import { asDate, asFactor, asRate, asScore, t } from "./texts.js";

export const find = (id) => document.getElementById(id);

/** An element with properties and content; data gets in as text alone. */
export function make(name, properties = {}, ...content) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...content);
  return element;
}

/** Open a dialog; gives what it was closed with, empty if it was cancelled. */
function open(dialog) {
  dialog.returnValue = "";
  for (const alert of dialog.querySelectorAll(".alert")) alert.textContent = "";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue), { once: true }));
}

for (const button of document.querySelectorAll("dialog .close")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}

/** Where an error is told: in the dialog on top, if there is one. */
export function alertOnTop() {
  return [...document.querySelectorAll("dialog[open] .alert")].pop() ?? null;
}

/** Ask; gives whether the answer was yes. */
export async function ask({ title, text = "", body = [], yes, wait = null }) {
  find("ask-title").textContent = title;
  find("ask-text").textContent = text;
  find("ask-body").replaceChildren(...body);
  const button = find("ask-yes");
  button.textContent = yes;
  button.disabled = Boolean(wait);
  if (wait) wait.addEventListener("change", () => (button.disabled = !wait.checked));
  return (await open(find("ask"))) === "yes";
}

/** Ask for a name; gives it, or null. */
export async function askName({ title, text, label, value = "", yes }) {
  const input = make("input", { value, required: true, maxLength: 60, autocomplete: "off", autofocus: true });
  const body = [make("label", {}, make("span", { textContent: label }), input)];
  return (await ask({ title, text, body, yes })) ? input.value.trim() : null;
}

/** Ask which of several names; gives it, or null. */
export async function askWhich({ title, names, yes }) {
  const select = make("select", { ariaLabel: title }, ...names.map((name) => make("option", { value: name, textContent: name })));
  return (await ask({ title, body: [select], yes })) ? select.value : null;
}

/** Ask a second time, and show what else would pass. */
export function askAgain(id, excess, others) {
  const tick = make("input", { type: "checkbox", id: "confirm-tick" });
  const body = [make("div", { className: "thumbs" }, thumbnail(`parts/${id}/image?side=256`))];
  body.push(make("p", { textContent: t(others.length ? "confirm.others" : "confirm.noOthers") }));
  if (others.length) {
    const pictures = others.map((other) => {
      const image = thumbnail(`parts/${other}/image?side=256`);
      image.alt = t("part.id", { id: other });
      return image;
    });
    body.push(make("div", { className: "thumbs", id: "would-pass" }, ...pictures));
  }
  const text = make("span", { textContent: t(others.length ? "confirm.tick" : "confirm.tickOne") });
  body.push(make("label", { className: "tick" }, tick, text));
  return ask({
    title: t("confirm.title", { id }),
    text: t("confirm.text", { excess: asFactor(excess) }),
    body,
    yes: t("confirm.yes"),
    wait: tick,
  });
}

let defectStage = null;
/** Ask where the defect of a part is; gives `{box}`, or null if it is none after all. */
export async function askDefect(id, loaded) {
  if (!defectStage) {
    defectStage = new Stage(find("defect-stage"));
    defectStage.opacity = 0;
    defectStage.takeBoxes(() => (find("defect-clear").disabled = defectStage.boxInPixels() === null));
    find("defect-clear").addEventListener("click", () => {
      defectStage.show({ ...defectStage, box: null });
      find("defect-clear").disabled = true;
    });
  }
  find("show-defect-title").textContent = t("defect.title", { id });
  find("defect-clear").disabled = true;
  defectStage.show(loaded);
  return (await open(find("show-defect"))) === "yes" ? { box: defectStage.boxInPixels() } : null;
}

// Who one is

let asking = null;
/** Ask who one is; gives whether a PIN was given that allows what is needed, if anything is. */
export function askPerson(needed = null) {
  asking ??= askPersonOnce(needed).finally(() => (asking = null));
  return asking;
}

async function askPersonOnce(needed) {
  const dialog = find("person");
  const why = needed && (needed === "teach" ? "role.teachNeeded" : "role.judgeNeeded");
  find("person-why").textContent = why ? t(why) : "";
  find("person-name").value = person.who;
  find("person-pin").value = "";
  find("person-pin").required = Boolean(needed);
  find("person-out").hidden = !person.isSignedIn;
  dialog.querySelector(".close").hidden = needed === "judge"; // nothing can be seen without
  dialog.oncancel = (event) => {
    if (needed === "judge") event.preventDefault();
  };
  dialog.querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    const [name, secret] = [find("person-name").value.trim(), find("person-pin").value];
    try {
      const role = await roleOf(secret || undefined);
      if (needed && role !== "teach" && role !== needed) throw new Error(t("role.notEnough"));
      person.signIn(name, secret);
      document.dispatchEvent(new Event("signed-in"));
      dialog.close("yes");
    } catch (error) {
      dialog.querySelector(".alert").textContent = error.message;
      find("person-pin").select();
    }
  };
  return (await open(dialog)) === "yes";
}

onPinNeeded(askPerson);
find("person-out").addEventListener("click", () => {
  person.signOut();
  location.reload();
});

// Products

const RATES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1];

/** List the products; `change(kind, name, value)` changes one. */
export function showProducts(variants, change) {
  listProducts(variants, change);
  return open(find("show-products"));
}

export function listProducts(variants, change) {
  const names = Object.keys(variants);
  find("product-list").replaceChildren(
    ...names.map((name) => {
      const about = variants[name];
      const values = RATES.includes(about.false_alarm_rate) ? RATES : [about.false_alarm_rate, ...RATES];
      const select = make("select", { onchange: () => change("rate", name, Number(select.value)) });
      if (about.by_hand) select.append(make("option", { value: "", textContent: t("products.byHand") }));
      select.append(...values.map((rate) => make("option", { value: rate, textContent: asRate(rate) })));
      select.value = about.by_hand ? "" : about.false_alarm_rate;
      const button = (kind, disabled = false) =>
        make("button", { textContent: t(`products.${kind}`), disabled, onclick: () => change(kind, name) });
      const told = {
        count: about.images,
        defects: about.defects_shown,
        sure: t(about.is_sure ? "products.sure" : "products.unsure"),
      };
      return make(
        "article",
        {},
        make("h3", { textContent: name }),
        make("p", { className: "soft", textContent: t("products.about", told) }),
        make("label", {}, make("span", { textContent: t("products.rate") }), select),
        make("div", { className: "buttons" }, button("rename"), button("merge", names.length < 2), button("delete", names.length < 2)),
      );
    }),
  );
}

// Teachings

/** What a line of the log says. */
export function describe({ kind, arguments: given = {}, undone }) {
  if (kind === "learn") {
    const what = given.defective ? "defect" : "learn";
    return given.variant == null ? t(`teachings.${what}Any`) : t(`teachings.${what}`, given);
  }
  if (kind === "undo") return t("teachings.undone", { undone });
  if (kind !== "set_decision") return t(`teachings.${kind}`, given);
  if (given.false_alarm_rate != null) {
    const rate = asRate(given.false_alarm_rate);
    return given.variant == null ? t("teachings.rateAll", { rate }) : t("teachings.rate", { ...given, rate });
  }
  if (given.threshold == null) return t("teachings.decision");
  return t("teachings.threshold", { variant: given.variant, value: asFactor(given.threshold) });
}

/** List what was taught; `undo(teaching)` takes one back. */
export async function showTeachings(undo) {
  await listTeachings(undo);
  return open(find("show-teachings"));
}

export async function listTeachings(undo) {
  const lines = await get("teachings");
  const items = lines.map((line) => {
    const about = { when: asDate(line.time), who: line.who || t("teachings.nobody") };
    const text = make(
      "div",
      {},
      make("strong", { textContent: describe(line) }),
      make("p", { className: "soft", textContent: `${t("teachings.number", line)} · ${t("teachings.by", about)}` }),
    );
    const hasPicture = line.undoable && line.images?.length;
    const picture = hasPicture ? thumbnail(`teachings/${line.number}/image`) : make("span", { className: "blank" });
    const item = make("li", {}, picture, text);
    if (line.undoable) {
      item.append(make("button", { textContent: t("teachings.undo"), onclick: () => undo(line) }));
    }
    return item;
  });
  find("teaching-list").replaceChildren(...(items.length ? items : [make("li", { textContent: t("teachings.none") })]));
}

export const showHelp = () => open(find("show-help"));

/** A thumbnail of a part with its verdict in shape and words. */
export function partButton(part, pick) {
  const kind = kindOf(part);
  const verdict = t(`verdict.${kind}`);
  const button = make("button", { className: `thumb ${kind}`, onclick: () => pick(part.id) });
  button.setAttribute("aria-label", t("list.part", { id: part.id, verdict, score: asScore(part.pred_score) }));
  button.dataset.key = `${part.id} ${part.time}`;
  const score = make("span", {}, icon(kind), asScore(part.pred_score));
  if (!part.is_sure) score.append(icon("unsure"));
  button.append(thumbnail(`parts/${part.id}/image?side=256`), score);
  return button;
}
