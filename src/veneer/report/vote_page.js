"use strict";
const { name, ballot, pairs } = JSON.parse(document.getElementById("data").textContent);
const key = "veneer-votes-" + ballot;
const keys = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", t: "tie", 0: "tie", s: "skip" };
const part = (id) => document.getElementById(id);
let votes = {};
try {
  votes = JSON.parse(localStorage.getItem(key)) || {};
} catch {
  part("warning").textContent = "This browser keeps no votes: save them before you close the page.";
}
let at = pairs.findIndex((pair) => !(pair.id in votes));
if (at < 0) at = pairs.length;

function show() {
  const isOver = at >= pairs.length;
  const done = Object.keys(votes).length;
  part("bar").max = pairs.length;
  part("bar").value = done;
  part("count").textContent = (isOver ? "" : `Pair ${at + 1} of ${pairs.length}, `) + `${done} voted on`;
  part("pair").hidden = isOver;
  part("end").hidden = !isOver;
  for (const side of ["prompt", "left", "right"]) part(side).textContent = isOver ? "" : pairs[at][side];
  for (const button of document.querySelectorAll("[data-vote]")) {
    button.disabled = isOver;
    button.setAttribute("aria-pressed", String(!isOver && votes[pairs[at].id] === button.dataset.vote));
  }
  part("back").disabled = at === 0;
  part("save").disabled = done === 0;
}

function vote(choice) {
  if (at >= pairs.length) return;
  votes[pairs[at].id] = choice;
  at += 1;
  try {
    localStorage.setItem(key, JSON.stringify(votes));
  } catch {
    part("warning").textContent = "This browser keeps no votes: save them before you close the page.";
  }
  show();
  window.scrollTo(0, 0);
}

function back() {
  at = Math.max(0, at - 1);
  show();
}

function save() {
  const text = JSON.stringify({ ballot, votes }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `${name.replace(/[^\w-]/g, "-")}-votes.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

for (const button of document.querySelectorAll("[data-vote]")) button.onclick = () => vote(button.dataset.vote);
part("back").onclick = back;
part("save").onclick = save;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const pressed = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (pressed === "Backspace") back();
  else if (keys[pressed]) vote(keys[pressed]);
  else return;
  event.preventDefault();
});
show();
