// The attention explorer. Its data stand in the page as JSON: see `_facts` in vit_nbdev/interpret.py.
'use strict';

const $ = id => document.getElementById(id);
const range = n => [...Array(n).keys()];
const D = JSON.parse($('data').textContent);

const [R, C] = D.grid;                                // rows and columns of patches
const P = D.prefix.length;                            // tokens in front of the patches
const N = P + R*C;                                    // all tokens
const L = D.depth;
const H = D.heads;
const OUT = N;                                        // what the head reads counts as one more token
const VIEWS = ['one head', 'mean of heads', 'rollout'];
const [ONE_HEAD, MEAN, ROLLOUT] = [0, 1, 2];

// tokens that are no patches, as [token, name]
const extra = D.prefix.map((name, i) => [i, name]).concat(D.output ? [[OUT, D.output]] : []);

// the state of the page: everything that is drawn follows from it
const S = {image: 0, view: ONE_HEAD, block: L - 1, head: 0, query: D.output ? OUT : 0, held: false};

const percent = w => (100*w).toFixed(1) + ' %';
const isPatch = t => t >= P && t < N;

function name(t) {
  if (!isPatch(t)) return extra.find(e => e[0] === t)[1];
  return `row ${Math.floor((t - P)/C)}, column ${(t - P) % C}`;
}

// ---- the stored weights ----

function fromBase64(text) {                           // a loop: more than ten times as fast as Uint8Array.from
  const stored = atob(text);
  const out = new Uint8Array(stored.length);
  for (let i = 0; i < out.length; i++) out[i] = stored.charCodeAt(i);
  return out;
}

async function unpack(text) {
  const stored = fromBase64(text);
  if (!D.deflated) return stored;
  const stream = new Blob([stored]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function load(im) {                             // an image counts as loaded when it can be drawn
  im.picture = new Image();
  im.picture.src = im.src;
  const [maps, rollout] = await Promise.all([unpack(im.maps), unpack(im.rollout), im.picture.decode()]);
  Object.assign(im, {maps, rollout, loaded: true});
  draw();
}

const PART = range(256).map(i => (i/D.steps)**2);     // of the largest weight of a map, for each byte

function addRow(out, bytes, scale, map, query, share) {
  const start = (map*N + query)*N;
  for (let t = 0; t < N; t++) out[t] += share*scale[map]*PART[bytes[start + t]];
}

function weights(view, block, head, query) {          // what `query` attends to: a number for each token
  const im = D.images[S.image];
  const out = new Float64Array(N);
  const askers = query === OUT ? range(N).filter(t => im.read[t] > 0) : [query];
  for (const t of askers) {
    const share = query === OUT ? im.read[t] : 1;
    if (view === ROLLOUT) addRow(out, im.rollout, im.rollout_scale, block, t, share);
    else if (view === ONE_HEAD) addRow(out, im.maps, im.scale, block*H + head, t, share);
    else range(H).forEach(h => addRow(out, im.maps, im.scale, block*H + h, t, share/H));
  }
  return out;
}

const highest = row => Math.max(1e-9, ...row.slice(P));

// ---- colours ----

const LUT = fromBase64(D.colours);
const css = rgb => `rgb(${rgb})`;

function colour(w, top) {
  const i = 3*Math.min(255, Math.round(255*w/top));
  return [LUT[i], LUT[i + 1], LUT[i + 2]];
}

function onTop([r, g, b]) {                           // black or white, whichever can be read on this colour
  return r*.3 + g*.59 + b*.11 > 130 ? '#000' : '#fff';
}

// ---- drawing ----

function fit(canvas) {                                // as many pixels as the screen has
  const box = canvas.getBoundingClientRect();
  const s = devicePixelRatio || 1;
  const w = Math.round(box.width*s);
  const h = Math.round(box.height*s);
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
  }
  return [canvas.getContext('2d'), w, h, s];
}

function cell(i, w, h) {                              // where patch `i` lies: x, y, width, height
  const r = Math.floor(i/C);
  const c = i % C;
  const x = Math.round(c*w/C);
  const y = Math.round(r*h/R);
  return [x, y, Math.round((c + 1)*w/C) - x, Math.round((r + 1)*h/R) - y];
}

function frame(ctx, w, h, s) {                        // around the patch that asks
  if (!isPatch(S.query)) return;
  const [x, y, cw, ch] = cell(S.query - P, w, h);
  for (const [style, width] of [['#000', 4*s], ['#fff', 2*s]]) {
    ctx.strokeStyle = style;
    ctx.lineWidth = width;
    ctx.strokeRect(x + 2*s, y + 2*s, cw - 4*s, ch - 4*s);
  }
}

function drawPicture(row, top) {
  const [ctx, w, h, s] = fit($('picture').firstChild);
  ctx.imageSmoothingEnabled = false;
  ctx.drawImage(D.images[S.image].picture, 0, 0, w, h);
  if ($('dim').checked) {
    for (const i of range(R*C)) {
      ctx.fillStyle = `rgba(20, 23, 28, ${.72*(1 - Math.min(1, row[P + i]/top))})`;
      ctx.fillRect(...cell(i, w, h));
    }
  }
  if (w/C > 12*s) {
    ctx.strokeStyle = 'rgba(128, 128, 128, .45)';
    ctx.lineWidth = s;
    for (const i of range(R*C)) ctx.strokeRect(...cell(i, w, h));
  }
  frame(ctx, w, h, s);
}

function drawMap(canvas, row, top, large) {
  const [ctx, w, h, s] = fit(canvas);
  ctx.font = `${12*s}px system-ui, sans-serif`;
  ctx.textAlign = 'center';
  ctx.textBaseline = 'middle';
  for (const i of range(R*C)) {
    const rgb = colour(row[P + i], top);
    const [x, y, cw, ch] = cell(i, w, h);
    ctx.fillStyle = css(rgb);
    ctx.fillRect(x, y, cw, ch);
    if (large && cw > 30*s) {
      ctx.fillStyle = onTop(rgb);
      ctx.fillText((100*row[P + i]).toFixed(1), x + cw/2, y + ch/2);
    }
  }
  if (large) frame(ctx, w, h, s);
}

function drawBar(top) {                               // upright; on a phone it lies
  const [ctx, w, h] = fit($('bar'));
  const tall = h > w;
  const n = tall ? h : w;
  for (const i of range(n)) {
    ctx.fillStyle = css(colour(tall ? 1 - i/n : i/n, 1));
    if (tall) ctx.fillRect(0, i, w, 1);
    else ctx.fillRect(i, 0, 1, h);
  }
  $('high').textContent = percent(top);
  $('mid').textContent = percent(top/2);
}

function drawHeads() {
  const rows = range(L*H).map(k => weights(ONE_HEAD, Math.floor(k/H), k % H, S.query));
  const own = $('own').checked;
  const top = Math.max(...rows.map(highest));
  $('heads').querySelectorAll('button').forEach((b, k) => {
    drawMap(b.firstChild, rows[k], own ? highest(rows[k]) : top, false);
  });
  const scale = own ? 'Colours of each: 0 to its largest weight' : `Colours of all: 0 to ${percent(top)}`;
  $('range').textContent = `${scale}. Click on a head to see it large.`;
}

function draw() {
  if (!D.images[S.image].loaded) return;
  const row = weights(S.view, S.block, S.head, S.query);
  const top = highest(row);
  drawPicture(row, top);
  drawMap($('map').firstChild, row, top, true);
  drawBar(top);
  drawHeads();
  sayMost(row);
  showTokens(row, top);
  showControls();
  showPrediction();
  showTable(row);
}

// ---- words and numbers ----

function sayMost(row) {
  const heads = S.view === MEAN ? 'mean of heads' : `head ${S.head}`;
  const where = S.view === ROLLOUT ? `Rollout through blocks 0 to ${S.block}` : `Block ${S.block}, ${heads}`;
  const order = range(N).sort((a, b) => row[b] - row[a]);
  const most = order.slice(0, 2).map(t => `<b>${name(t)}</b>: <b>${percent(row[t])}</b>`).join(', then to ');
  const held = S.held ? ' (held)' : '';
  $('said').innerHTML =
    `${where}. <b>${name(S.query)}</b>${held} attends most to ${most}. Even attention would be ${percent(1/N)}.`;
}

function showTokens(row, top) {
  $('tokens').querySelectorAll('span').forEach((span, i) => {
    const t = extra[i][0];
    if (t === OUT) {
      span.remove();
      return;
    }
    const rgb = colour(row[t], top);
    span.textContent = percent(row[t]);
    span.style.background = css(rgb);
    span.style.color = onTop(rgb);
  });
}

function press(id, chosen) {
  $(id).querySelectorAll('button').forEach((b, i) => b.setAttribute('aria-pressed', i === chosen));
}

function showControls() {
  $('depth').textContent = S.view === ROLLOUT ? `blocks 0 to ${S.block}` : `block ${S.block}`;
  $('block').value = S.block;
  $('pick').hidden = S.view !== ONE_HEAD;
  press('images', S.image);
  press('views', S.view);
  press('numbers', S.head);
  press('tokens', extra.findIndex(e => e[0] === S.query));
  press('heads', S.view === ONE_HEAD ? S.block*H + S.head : -1);
}

function showPrediction() {
  const probs = D.images[S.image].probs;
  $('prediction').hidden = !probs.length;              // features have no classes
  $('probs').innerHTML =
    probs.map(([, p]) => `<span></span><i style="width: ${100*p}%"></i><b>${percent(p)}</b>`).join('');
  $('probs').querySelectorAll('span').forEach((span, i) => {
    span.textContent = probs[i][0];                   // a label is text, whatever is in it
    span.title = probs[i][0];
  });
}

function showTable(row) {
  const value = t => `<td data-token="${t}" data-value="${row[t]}">${percent(row[t])}</td>`;
  const line = (label, cells) => `<tr><th scope="row">${label}</th>${cells.join('')}</tr>`;
  const prefix = range(P).map(t => line(D.prefix[t], [value(t)]));
  const head = line('', range(C).map(c => `<th scope="col">column ${c}</th>`));
  const patches = range(R).map(r => line(`row ${r}`, range(C).map(c => value(P + r*C + c))));
  $('table').innerHTML = [...prefix, head, ...patches].join('');
}

// ---- what can be pressed and pointed at ----

function set(change) {
  Object.assign(S, change);
  draw();
}

function button(parent, label, act) {                 // returned without content; a screen reader says its label
  const b = document.createElement('button');
  b.type = 'button';
  b.setAttribute('aria-label', label);
  b.onclick = act;
  $(parent).append(b);
  return b;
}

function makeControls() {
  document.documentElement.style.setProperty('--shape', `${C}/${R}`);
  $('about').textContent = D.about;
  $('block').max = L - 1;
  D.images.forEach((im, i) => {
    const thumb = new Image();
    thumb.alt = '';
    thumb.src = im.src;
    const b = button('images', im.title, () => set({image: i}));
    b.className = 'thumb';
    b.append(thumb);
  });
  VIEWS.forEach((view, i) => button('views', view, () => set({view: i})).append(view));
  range(H).forEach(h => button('numbers', String(h), () => set({head: h})).append(h));
  extra.forEach(([t, label]) => {
    const b = button('tokens', label, () => set({query: t, held: true}));
    b.className = 'chip';
    b.append(label, document.createElement('span'));
  });
}

function makeHeads() {
  const label = text => {
    const span = document.createElement('span');
    span.textContent = text;
    $('heads').append(span);
  };
  const widest = Math.max(4, Math.min(9, 40/H));
  $('heads').style.gridTemplateColumns = `3.2rem repeat(${H}, minmax(0, ${widest}rem))`;
  label('');
  range(H).forEach(h => label(H > 6 ? h : `head ${h}`));
  range(L).forEach(block => {
    label(`block ${block}`);
    range(H).forEach(head => {
      const act = () => set({view: ONE_HEAD, block, head});
      button('heads', `block ${block}, head ${head}`, act).append(document.createElement('canvas'));
    });
  });
}

function patchAt(event, box) {                        // the patch under the pointer
  const r = box.getBoundingClientRect();
  const index = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v*n)));
  return P + index((event.clientY - r.top)/r.height, R)*C + index((event.clientX - r.left)/r.width, C);
}

function listen() {
  const picture = $('picture');
  const map = $('map');
  const hint = $('read').textContent;
  $('block').oninput = event => set({block: Number(event.target.value)});
  $('dim').onchange = draw;
  $('own').onchange = draw;
  picture.onpointermove = event => {
    if (event.pointerType === 'mouse' && !S.held) set({query: patchAt(event, picture)});
  };
  picture.onpointerdown = event => {
    const query = patchAt(event, picture);
    set({held: !S.held || query !== S.query, query});
  };
  map.onpointermove = event => {
    const t = patchAt(event, map);
    const stored = $('table').querySelector(`[data-token="${t}"]`);
    if (stored) $('read').textContent = `${name(t)}: ${stored.textContent}`;
  };
  map.onpointerleave = () => {
    $('read').textContent = hint;
  };
}

const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};

function move([dr, dc]) {                             // to the next patch; from no patch to the middle
  const inside = (v, n) => Math.max(0, Math.min(n - 1, v));
  const i = S.query - P;
  const [r, c] = isPatch(S.query) ? [Math.floor(i/C) + dr, i % C + dc] : [Math.floor(R/2), Math.floor(C/2)];
  set({query: P + inside(r, R)*C + inside(c, C), held: true});
}

function nextToken() {
  if (!extra.length) return;
  const now = extra.findIndex(e => e[0] === S.query);
  set({query: extra[(now + 1) % extra.length][0], held: true});
}

const KEYS = {
  h: () => set({view: ONE_HEAD, head: (S.head + 1) % H}),
  v: () => set({view: (S.view + 1) % VIEWS.length}),
  i: () => set({image: (S.image + 1) % D.images.length}),
  t: nextToken,
  '[': () => set({block: Math.max(0, S.block - 1)}),
  ']': () => set({block: Math.min(L - 1, S.block + 1)}),
  escape: () => set({held: false}),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const arrow = ARROWS[event.key];
  if (arrow && document.activeElement === $('picture')) {
    event.preventDefault();
    move(arrow);
    return;
  }
  const act = KEYS[event.key.toLowerCase()];
  if (act) act();
}

// ---- start ----

makeControls();
makeHeads();
listen();
document.addEventListener('keydown', onKey);
new ResizeObserver(draw).observe(document.body);
if (D.deflated && !('DecompressionStream' in window)) {
  $('said').textContent = 'This browser is from before 2023 and can not unpack the weights: ' +
    'open the page in a newer one, or make it anew with explore(..., compress=False).';
} else {
  D.images.forEach(load);
}
