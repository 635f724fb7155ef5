// Menu, dark mode, search, copy buttons. Without it the pages can be read all the same.
(() => {
  const $ = (s, at = document) => at.querySelector(s), root = document.documentElement, base = document.body.dataset.root + '/';

  $('#ui-menu').onclick = e => e.currentTarget.setAttribute('aria-expanded', root.classList.toggle('menu'));
  $('#ui-theme').onclick = () => {
    root.dataset.theme = root.dataset.theme === 'dark' ? 'light' : 'dark';
    try { localStorage.setItem('theme', root.dataset.theme); } catch {}
  };
  const current = $('.side [aria-current]');
  if (current && current.offsetTop > innerHeight - 160) $('.side').scrollTop = current.offsetTop - innerHeight / 2;

  if (innerWidth <= 16 * 84) $('.aside details')?.removeAttribute('open');

  // an address may point into something folded
  const open = () => { let at; try { at = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch {}
    for (let e = at; e; e = e.parentElement) if (e.tagName === 'DETAILS') e.open = true;
    if (at && at.closest('details')) at.scrollIntoView(); };
  addEventListener('hashchange', open); open();

  // the section that is being read
  const links = new Map([...document.querySelectorAll('.aside a')].map(a => [decodeURIComponent(a.hash.slice(1)), a]));
  const places = [...links.keys()].map(id => document.getElementById(id)).filter(e => e && /^H[23]$/.test(e.tagName) && !e.closest('details:not([open])')).sort((a, b) => a.compareDocumentPosition(b) & 4 ? -1 : 1);
  const follow = () => { // the last heading above the upper third; at the very end, the last one
    const end = innerHeight + scrollY > document.body.scrollHeight - 4, at = end && scrollY ? places.at(-1) : places.findLast(e => e.getBoundingClientRect().top < innerHeight / 3);
    const link = at && links.get(at.id), was = $('.aside .now');
    if (link !== was) { was?.classList.remove('now'); link?.classList.add('now'); }
  };
  let waiting = false;
  addEventListener('scroll', () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; follow(); }); } }, { passive: true });
  if (places.length) follow();

  for (const box of document.querySelectorAll('div.sourceCode')) {
    const b = document.createElement('button'); b.className = 'copy'; b.textContent = 'Copy'; b.type = 'button';
    b.onclick = () => navigator.clipboard?.writeText($('code', box).textContent).then(() => { b.textContent = 'Copied'; setTimeout(() => b.textContent = 'Copy', 1500); }, () => {});
    box.append(b);
  }

  // search: titles and names at once, then the text of all pages (needs a server: a file may not read other files)
  const box = $('#ui-search'), input = $('input', box), hits = $('#ui-hits'), web = location.protocol !== 'file:';
  let engine, turn = 0;
  const titles = () => window.TITLES ? Promise.resolve() : new Promise(done => { const s = document.createElement('script'); s.src = base + 'titles.js'; s.onload = s.onerror = done; document.head.append(s); });
  const text = () => engine ??= web ? import(new URL(base + 'pagefind/pagefind.js', location.href).href).then(async p => { await p.init(); return p; }).catch(() => null) : Promise.resolve(null);
  const row = (url, title, where, html) => { const li = document.createElement('li'), a = document.createElement('a'), s = document.createElement('small'); a.href = url; a.textContent = title; if (html) s.innerHTML = html; else s.textContent = where; a.append(s); li.append(a); hits.append(li); };
  const note = t => { const li = document.createElement('li'); li.className = 'note'; li.textContent = t; hits.append(li); };
  const near = q => {
    const words = q.toLowerCase().split(/\s+/);
    const score = ([t, url, , promise]) => { // the very name, a title with all words, a name that begins so, one with all words, a promise
      const l = t.toLowerCase(), all = words.every(w => l.includes(w)), page = !url.includes('#');
      return l === q.toLowerCase() ? 5 : all ? page ? 4 : l.startsWith(words[0]) ? 3 : 2 : promise && words.every(w => (l + ' ' + promise.toLowerCase()).includes(w)) ? 1 : 0;
    };
    return (window.TITLES || []).map((t, i) => [score(t), i, t]).filter(s => s[0]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, 6).map(s => s[2]);
  };
  const search = async () => {
    const mine = ++turn, q = input.value.trim();
    if (!q) { hits.replaceChildren(); return; }
    await titles(); if (mine !== turn) return;
    const first = near(q); hits.replaceChildren();
    for (const [t, url, where, promise] of first) row(base + url, t, promise || where);
    const p = await text(); if (mine !== turn) return;
    if (!p) { if (!first.length) note('Nothing found in titles and names.'); if (!web) note('The text of the pages is searched when the site is served: python -m http.server -d _docs --bind 127.0.0.1'); return; }
    const found = await p.debouncedSearch(q, {}, 120); if (mine !== turn || !found) return;
    const pages = await Promise.all(found.results.slice(0, 8).map(r => r.data())); if (mine !== turn) return;
    for (const d of pages) {
      const best = d.sub_results?.find(s => s.url.includes('#')) || d, to = new URL(base + '.', location.href).pathname;
      const local = u => u.startsWith('/') && !u.startsWith(to) ? to + u.slice(1) : u;
      row(local(best.url), best.title && best.title !== d.meta.title ? `${d.meta.title}: ${best.title}` : d.meta.title, '', best.excerpt);
    }
    if (!first.length && !pages.length) note('Nothing found.');
    hits.dataset.for = q;
  };
  const show = () => { if (!box.open) { box.showModal(); input.select(); titles(); text(); } };
  input.oninput = search; $('#ui-find').onclick = show;
  hits.onclick = e => { if (e.target.closest('a')) box.close(); };
  box.onclick = e => { if (e.target === box) box.close(); };
  box.onkeydown = e => {
    const all = [...hits.querySelectorAll('a')], i = all.indexOf(document.activeElement);
    if (e.key === 'Enter' && document.activeElement === input) { e.preventDefault(); all[0]?.click(); }
    if (e.key === 'ArrowDown') { e.preventDefault(); all[Math.min(i + 1, all.length - 1)]?.focus(); }
    if (e.key === 'ArrowUp') { e.preventDefault(); (i > 0 ? all[i - 1] : input).focus(); }
  };
  addEventListener('keydown', e => { if (e.key === '/' && !box.open && !e.ctrlKey && !e.metaKey && !/^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) { e.preventDefault(); show(); } });
})();
