// Help to compose: click on a variable to insert it, and see the preview when typing stops. Each preview saves what was
// typed. Without this script the buttons of the form do the same.
"use strict";

const PAUSE = 700; // milliseconds without typing
const form = document.getElementById("compose");
const text = document.getElementById("f-text");
let timer = null;
let isAsking = false;
let isDirty = false;
let isLeaving = false;
let needsRows = false; // a field was chosen: its values are to be offered

function makeButtons() {
  for (const code of document.querySelectorAll(".variables code")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "second small";
    button.textContent = code.textContent;
    button.addEventListener("click", () => insert(code.textContent));
    code.replaceWith(button);
  }
}

function insert(variable) {
  text.setRangeText(variable, text.selectionStart, text.selectionEnd, "end");
  text.focus();
  changed();
}

function showRows() {
  const mode = form.elements.mode.value;
  document.getElementById("rows").hidden = mode === "everyone" || mode === "json";
}

function changed() {
  isDirty = true;
  clearTimeout(timer);
  timer = setTimeout(ask, PAUSE);
}

function say(sentence) {
  const note = document.createElement("p");
  note.className = "note problem";
  note.textContent = sentence;
  document.getElementById("h-preview").after(note);
}

// One request at a time: the server saves with each one, and the next one must know of it.
async function ask() {
  if (isAsking || !isDirty || isLeaving) return;
  isAsking = true;
  isDirty = false;
  form.elements.sequence.value++; // a request that is overtaken by the next one saves nothing
  const fields = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (typeof value === "string") fields.append(name, value);
  fields.append("do", "preview");
  try {
    const answer = await fetch(form.action, { method: "POST", body: fields, signal: AbortSignal.timeout(30000) });
    if (answer.status === 401) say("Your session has ended. Press Preview to log in; nothing that you wrote is lost.");
    else if (!answer.ok) throw new Error(answer.status);
    else take(new DOMParser().parseFromString(await answer.text(), "text/html"), new URL(answer.url).pathname);
  } catch {
    say("The server does not answer, so this is not saved yet. The next change tries again.");
  }
  isAsking = false;
  if (isDirty) changed();
}

// Take over the preview, and where it was saved.
function take(page, path) {
  const fresh = page.getElementById("preview");
  if (!fresh) return;
  const open = [...document.querySelectorAll("#preview details[open][id]")].map((each) => each.id);
  document.getElementById("preview").replaceChildren(...fresh.childNodes);
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  document.getElementById("counted").textContent = page.getElementById("counted").textContent;
  for (const name of ["id", "version"]) form.elements[name].value = page.querySelector(`#compose [name=${name}]`).value;
  form.action = path;
  history.replaceState(null, "", path);
  if (needsRows) takeRows(page);
}

function takeRows(page) {
  const focused = document.activeElement?.id;
  needsRows = false;
  const rows = page.getElementById("rows");
  for (const row of rows.querySelectorAll(".refused")) forgive(row); // somebody is still filling it in
  document.getElementById("rows").replaceChildren(...rows.childNodes);
  const json = page.getElementById("f-json");
  if (json && !document.getElementById("f-json")) location.reload(); // the query in JSON is a field of its own
  document.getElementById(focused)?.focus();
}

// What was refused is being corrected.
function forgive(field) {
  field.classList.remove("refused");
  field.querySelector(".error")?.remove();
  for (const input of field.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

form.addEventListener("input", (event) => {
  const refused = event.target.closest(".refused");
  if (refused) forgive(refused);
  changed();
});
form.addEventListener("change", (event) => {
  if (event.target.tagName === "SELECT") needsRows = true;
  showRows();
});
form.addEventListener("submit", (event) => {
  if (isLeaving) return event.preventDefault(); // a double click
  isLeaving = true;
  clearTimeout(timer);
  isDirty = false;
  form.elements.sequence.value++;
});
addEventListener("pageshow", () => { isLeaving = false; }); // back from the next page
makeButtons();
showRows();
