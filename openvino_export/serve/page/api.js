// SPDX-License-Identifier: Apache-2.0
// How the page speaks with the station: requests, who one is, and events that come by themselves.

import { t } from "./texts.js";

// A sign of life comes every 15 seconds; without one for so long the line is dead.
const SILENCE = 40_000;
const RETRY = [500, 1000, 2000, 3000];
const TIMEOUT = 60_000;
const TOKEN_LENGTH = 16; // a token has at least so many characters, a PIN has fewer

/** An answer that says no; `status` 0 if there was none. */
export class Refused extends Error {
  constructor(status, content) {
    super(content.error ?? content.detail?.[0]?.msg ?? content.detail ?? `HTTP ${status}`);
    this.status = status;
    this.content = content;
  }
}

/** A person has closed the question for a PIN. */
export class Cancelled extends Error {}

export const person = {
  get who() {
    return sessionStorage.getItem("who") ?? "";
  },
  get isSignedIn() {
    return sessionStorage.getItem("secret") !== null;
  },
  signIn(who, secret) {
    sessionStorage.setItem("who", who);
    if (secret) sessionStorage.setItem("secret", secret);
  },
  signOut() {
    sessionStorage.clear();
  },
};

function headers(secret = sessionStorage.getItem("secret")) {
  const own = { "X-Who": encodeURIComponent(person.who) };
  if (secret?.length >= TOKEN_LENGTH) own.Authorization = `Bearer ${secret}`;
  else if (secret) own["X-Pin"] = secret;
  return own;
}

async function checked(response) {
  if (response.ok) return response;
  throw new Refused(response.status, await response.json().catch(() => ({})));
}

async function send(path, options = {}) {
  const signal = AbortSignal.timeout(TIMEOUT);
  const response = await fetch(path, { signal, ...options }).catch(() => {
    throw new Refused(0, { error: t("say.noAnswer") });
  });
  return checked(response);
}

/** What a PIN or token allows: teach, judge or null. */
export async function roleOf(secret) {
  return (await (await send("role", { headers: headers(secret) })).json()).role;
}

let askForPin = null;
/** Have a function called that asks for a PIN that allows a role; it answers whether there is one now. */
export function onPinNeeded(ask) {
  askForPin = ask;
}

/** Run a request; when it takes a PIN, ask for one and run it again. */
async function allowed(request, needed) {
  try {
    return await request();
  } catch (error) {
    if (error.status !== 401 && error.status !== 403) throw error;
    const role = await roleOf().catch((wrong) => (wrong.status === 401 ? null : Promise.reject(error)));
    if (role === "teach" || role === needed) throw error; // it was refused for another reason
    if (!(await askForPin(needed))) throw new Cancelled();
    return request();
  }
}

export async function get(path) {
  return (await allowed(() => send(path, { headers: headers() }), "judge")).json();
}

/** Change something at the station; takes the role that teaches. */
export async function post(path, body, method = "POST") {
  const content = body === undefined ? undefined : JSON.stringify(body);
  const request = () =>
    send(path, { method, body: content, headers: { ...headers(), "Content-Type": "application/json" } });
  return (await allowed(request, "teach")).json();
}

/** A picture, and the size of the image that it was made of. */
export async function picture(path) {
  const response = await send(path, { headers: headers() });
  const [width, height] = ["X-Width", "X-Height"].map((name) => Number(response.headers.get(name)));
  return { blob: await response.blob(), width, height };
}

/** Follow the station's events for ever; `onLine` is told whether there is a connection. */
export async function follow(onEvent, onLine) {
  for (let tries = 0; ; tries += 1) {
    const line = new AbortController();
    let timer;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => line.abort(), SILENCE);
    };
    try {
      alive();
      const request = () => fetch("events", { headers: headers(), signal: line.signal }).then(checked);
      const reader = (await allowed(request, "judge")).body.pipeThrough(new TextDecoderStream()).getReader();
      tries = 0;
      onLine(true);
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        alive();
        const blocks = (text + value).split("\n\n");
        text = blocks.pop();
        for (const block of blocks) {
          const found = /^event: (\w+)\ndata: (.*)$/s.exec(block);
          if (found) queueMicrotask(() => onEvent(found[1], JSON.parse(found[2])));
        }
      }
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof Refused || error instanceof Cancelled || line.signal.aborted)) {
        throw error;
      }
    } finally {
      clearTimeout(timer);
    }
    onLine(false);
    await new Promise((wake) => setTimeout(wake, RETRY[Math.min(tries, RETRY.length - 1)]));
  }
}
