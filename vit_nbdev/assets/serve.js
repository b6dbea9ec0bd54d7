'use strict';
// Names of files and classes are text, never markup: textContent only.
function add(parent, kind, text) {
  const element = parent.appendChild(document.createElement(kind));
  if (text !== undefined) element.textContent = text;
  return element;
}

async function ask(file) {
  const box = document.getElementById('answers').appendChild(document.createElement('section'));
  add(box, 'h2', file.name);
  const image = add(box, 'img');
  image.alt = file.name;
  image.style.maxWidth = image.style.maxHeight = '224px';
  image.src = URL.createObjectURL(file);
  const said = add(box, 'p', 'looking …');
  said.className = 'said';
  try {
    const answer = await (await fetch('predict', { method: 'POST', body: file })).json();
    if (answer.error) { said.textContent = answer.error; return; }
    said.textContent = `${answer.top[0][0]} (${(100*answer.top[0][1]).toFixed(1)} %)`;
    const table = add(box, 'table');
    for (const [name, p] of answer.top) {
      const row = add(table, 'tr');
      add(row, 'td', name);
      add(row, 'td', `${(100*p).toFixed(1)} %`);
    }
  } catch (e) {
    said.textContent = 'no answer: is the picture too large, or vit_serve no longer running?';
  }
}

async function askAll(files) { for (const file of files) await ask(file); }

document.getElementById('files').addEventListener('change', e => askAll([...e.target.files]));
document.addEventListener('dragover', e => e.preventDefault());
document.addEventListener('drop', e => { e.preventDefault(); askAll([...e.dataTransfer.files]); });
