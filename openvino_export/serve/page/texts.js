// SPDX-License-Identifier: Apache-2.0
// Every text of the page. For another language add a block like `en`; the browser's language chooses.

const TEXTS = {
  en: {
    "title": "Inspection",
    "skip": "Skip to the buttons",

    "state.connecting": "Connecting …",
    "state.off": "Not connected. What you see is old. It is tried again.",
    "state.on": "Parts are judged.",
    "state.paused": "Paused. No part is judged.",
    "state.learning": "Shown as new product “{name}”: {count} parts. {more} more until the verdict is sure.",
    "state.learningSure": "Shown as new product “{name}”: {count} parts. The verdict is sure.",
    "state.drift": "Good parts of “{name}” no longer look as learned. Check light, lens and camera.",
    "state.finish": "Finish",
    "state.seen": "Seen",
    "state.goOn": "Go on",

    "part.none": "No part yet",
    "part.noneHint": "The first part that is judged appears here.",
    "part.id": "Part {id}",
    "part.latest": "Latest part",
    "part.newer": "Latest part ({count} newer)",
    "part.picture": "Picture of part {id} with its heat map",
    "part.noPicture": "The picture of this part is no longer kept.",
    "part.heat": "Heat map",
    "part.learnedAs": "Learned as “{name}”.",

    "verdict.good": "Good",
    "verdict.bad": "Bad",
    "verdict.none": "No verdict",
    "verdict.unsure": "Not sure yet.",
    "verdict.unsureFew": "Not sure yet: {count} good parts are known; {sure} make it sure.",
    "verdict.score": "Score {score}",
    "verdict.limit": "bad above 0.5",
    "verdict.product": "Product {name}",
    "verdict.before": "Judged again. Before it was taught: {verdict}, {score}.",

    "good.button": "This is good",
    "teach.good_busy": "Part {id} is being learned as good …",
    "teach.good_done": "Learned. Part {id} is accepted now: {score}.",
    "teach.good_still": "Learned, but part {id} is still called bad: {score}. Teach more good parts like it.",
    "teach.known": "Part {id} was known already, so nothing was learned. It scores {score}. See Teachings.",
    "defect.button": "This is a defect",
    "teach.defect_busy": "Part {id} is being learned as a defect …",
    "teach.defect_done": "Learned. Part {id} is called bad: {score}.",
    "teach.defect_still": "Learned, but part {id} is still called good: {score}. Undo it, and draw a box around the defect.",
    "defect.title": "What is wrong with part {id}?",
    "defect.hint": "Draw a box around the defect if you can. Without a box, it is looked for.",
    "defect.clear": "Remove the box",
    "defect.learn": "Learn the defect",
    "defect.canvas": "Picture of the part. Draw a box with finger, pen or mouse.",
    "act.changed": "Part {id} has just come. Press again if you mean this one.",

    "undo.button": "Undo",
    "undo.title": "Take this back?",
    "undo.yes": "Take it back",
    "undo.none": "There is nothing that can be taken back.",
    "undo.done": "Taken back: {what}.",
    "undo.busy": "It is being taken back …",

    "confirm.title": "Part {id} is far from good",
    "confirm.text": "It scores {excess} times its threshold. If it is learned as good, parts like it pass from now on.",
    "confirm.others": "These parts, called bad until now, would pass as well:",
    "confirm.noOthers": "No other of the last parts called bad would pass with it.",
    "confirm.tick": "I have looked at them. All of them are good.",
    "confirm.tickOne": "I have looked at it. It is good.",
    "confirm.yes": "Learn it as good",

    "new.button": "New product",
    "new.title": "New product",
    "new.hint": "Give it a name, then let good parts pass. Each is learned. From {sure} parts on, the verdict is sure.",
    "new.name": "Name of the product",
    "new.start": "Start",
    "new.known": "“{name}” is known already. Start again to show more parts of it.",
    "new.started": "Let good parts of “{name}” pass now.",
    "new.done": "“{name}” is learned from {count} parts.",
    "new.undone": "No part of “{name}” has been learned.",

    "products.button": "Products",
    "products.title": "Products",
    "products.about": "Good parts: {count} · Defects shown: {defects} · {sure}",
    "products.sure": "Sure",
    "products.unsure": "Not sure yet",
    "products.rate": "False-alarm rate",
    "products.byHand": "threshold by hand",
    "products.rateSet": "Of the good parts of “{name}”, {rate} may be called bad.",
    "products.rename": "Rename",
    "products.renameTitle": "New name of “{name}”",
    "products.renamed": "“{name}” is called “{new}” now.",
    "products.merge": "Merge",
    "products.mergeTitle": "“{name}” is the same product as …",
    "products.merged": "“{name}” is a part of “{into}” now.",
    "products.delete": "Delete",
    "products.deleteTitle": "Forget “{name}”?",
    "products.deleteHint": "Its parts will be called bad, or be taken for another product. It can be undone.",
    "products.deleted": "“{name}” is forgotten.",

    "teachings.button": "Teachings",
    "teachings.title": "What was taught",
    "teachings.none": "Nothing was taught yet.",
    "teachings.by": "{when} · {who}",
    "teachings.nobody": "no name",
    "teachings.undo": "Take back",
    "teachings.learn": "Good part of “{variant}”",
    "teachings.learnAny": "Good part",
    "teachings.defect": "Defect of “{variant}”",
    "teachings.defectAny": "Defect",
    "teachings.rate": "False-alarm rate of “{variant}”: {rate}",
    "teachings.rateAll": "False-alarm rate of all products: {rate}",
    "teachings.threshold": "Threshold of “{variant}”: {value}",
    "teachings.decision": "Threshold by good parts again",
    "teachings.rename_variant": "“{variant}” renamed to “{new}”",
    "teachings.merge_variants": "“{variant}” merged into “{into}”",
    "teachings.delete_variant": "“{variant}” deleted",
    "teachings.undone": "Taken back: no. {undone}",
    "teachings.base": "The bundle as it came. What it knew then stays.",
    "teachings.number": "No. {number}",

    "pause.button": "Pause",
    "pause.goOn": "Go on",

    "strip.title": "Scores of the last 200 parts",
    "strip.count": "{bad} of {count} called bad",
    "strip.label": "Scores of the last {count} parts, the newest at the right. {bad} are called bad. Arrow keys move.",
    "list.title": "Last parts",
    "list.filter": "Called bad",
    "list.none": "No part was called bad.",
    "list.part": "Part {id}: {verdict}, {score}",

    "role.judge": "Operator",
    "role.teach": "Supervisor",
    "role.none": "Sign in",
    "role.title": "Who are you?",
    "role.name": "Your name, for the log",
    "role.pin": "PIN",
    "role.teachNeeded": "This takes the supervisor’s PIN.",
    "role.judgeNeeded": "This station takes a PIN.",
    "role.notEnough": "This PIN does not allow teaching.",
    "role.in": "Sign in",
    "role.out": "Leave the role",

    "help.button": "Help",
    "help.title": "Help",
    "help.good": "This is good",
    "help.defect": "This is a defect",
    "help.undo": "Undo",
    "help.pause": "Pause, or go on",
    "help.older": "Older and newer part",
    "help.latest": "Latest part",
    "help.help": "This help",
    "help.shapes": "Circle with a check: good. Octagon with a cross: bad. Diamond with a question mark: not sure yet.",

    "say.cancel": "Cancel",
    "say.close": "Close",
    "say.ok": "OK",
    "say.failed": "That did not work: {error}",
    "say.failedPart": "Part {id} was not learned: {error}",
    "say.noAnswer": "The station does not answer.",
    "say.drop": "Close this message",
  },
};

const language = navigator.languages.map((each) => each.split("-")[0]).find((each) => each in TEXTS) ?? "en";
document.documentElement.lang = language;

/** The text of a key, with values in place of {names}. */
export function t(key, values = {}) {
  const text = TEXTS[language][key] ?? TEXTS.en[key];
  if (text === undefined) throw new Error(`no text ${key}`);
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Fill all elements below a root that name their text. */
export function fillTexts(root) {
  for (const each of root.querySelectorAll("[data-text]")) each.textContent = t(each.dataset.text);
  for (const each of root.querySelectorAll("[data-label]")) each.setAttribute("aria-label", t(each.dataset.label));
}

const scores = new Intl.NumberFormat(language, { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const rates = new Intl.NumberFormat(language, { style: "percent", maximumSignificantDigits: 3 });
const factors = new Intl.NumberFormat(language, { maximumFractionDigits: 1 });
const times = new Intl.DateTimeFormat(language, { timeStyle: "medium" });
const dates = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" });

export const asScore = (value) => scores.format(value);
export const asRate = (value) => rates.format(value);
export const asFactor = (value) => factors.format(value);
export const asTime = (text) => times.format(new Date(text));
export const asDate = (text) => dates.format(new Date(text));
