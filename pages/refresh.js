// Keep what is marked with data-live as it is on the server: every 5 seconds while the page is visible.
// Without this script the page works as well; only a reload shows what is new.
"use strict";

const EVERY = 5000; // milliseconds
const address = new URL(location.href);
address.searchParams.delete("m"); // the message after a redirect stays as it is
const away = document.getElementById("away");
let lastAnswer = new Date();
let timer = null;

function say(text, link) {
  away.textContent = text;
  if (link) {
    const anchor = document.createElement("a");
    anchor.href = link;
    anchor.textContent = "Log in";
    away.append(" ", anchor);
  }
  away.hidden = !text;
}

// Replace the content of one part. What is open stays open, and the focus stays where it is.
function replace(part, fresh) {
  if (part.innerHTML === fresh.innerHTML) return;
  const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
  const open = [...part.querySelectorAll("details[open][id]")].map((each) => each.id);
  part.replaceChildren(...fresh.childNodes);
  part.className = fresh.className;
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

async function refresh() {
  const answer = await fetch(address, { signal: AbortSignal.timeout(10000), redirect: "error" });
  if (answer.status === 401) return say("Your session has ended.", address.pathname);
  if (!answer.ok) throw new Error(answer.status);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const found = fresh.getElementById(part.id);
    // Somebody who is typing in it must not lose a letter.
    if (found && !part.querySelector("input:focus, textarea:focus, select:focus")) replace(part, found);
  }
  lastAnswer = new Date();
  say("");
}

async function tick() {
  try {
    await refresh();
  } catch {
    say(`The server has not answered since ${lastAnswer.toLocaleTimeString()}. What you see is from then.`);
  }
  timer = document.hidden ? null : setTimeout(tick, EVERY);
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  timer = document.hidden ? null : setTimeout(tick, 0);
});
timer = setTimeout(tick, EVERY);
