-- What Quarto adds to Markdown, for plain pandoc: callouts, tabsets, folds, numbered figures, tables and equations, references to them
local titles = {note='Note', tip='Tip', warning='Warning', important='Important', caution='Caution'}
local kinds = {fig='Figure', tbl='Table', eq='Equation'}
local count, refs, ids = {}, {}, {}

local function number(id)
  local kind = id:match('^(%a+)%-')
  if not kinds[kind] then return end
  if not refs[id] then
    count[kind] = (count[kind] or 0) + 1
    refs[id] = {kind=kinds[kind], n=count[kind]}
  end
  return refs[id]
end

local label = {
  Header = function(h) -- anchors as pandoc's Markdown, and so Quarto, makes them
    if h.identifier == '' then
      local text = pandoc.text.lower(pandoc.utils.stringify(h.content)):gsub('[%z\1-\127]', function(c) return c:match('[%w%s_.-]') or '' end)
      local id = text:gsub('%s+', '-'):gsub('^[^%a\128-\255]+', '')
      if id == '' then id = 'section' end
      local n = ids[id]; ids[id] = (n or 0) + 1
      h.identifier = n and (id .. '-' .. n) or id
    end
    return h
  end,
  Figure = function(f)
    local r = number(f.identifier); if not r then return end
    local pre = {pandoc.Str(r.kind .. '\u{a0}' .. r.n .. ': ')}
    if f.caption.long[1] then f.caption.long[1].content = pandoc.List(pre) .. f.caption.long[1].content else f.caption.long = {pandoc.Plain(pre)} end
    return f
  end,
  Inlines = function(xs) -- `$$..$$ {#eq-x}`
    local out, i = pandoc.List(), 1
    while i <= #xs do
      local m = xs[i]
      local j = (xs[i+1] and xs[i+1].t == 'Str') and i+1 or i+2
      local id = m.t == 'Math' and m.mathtype == 'DisplayMath' and xs[j] and xs[j].t == 'Str' and xs[j].text:match('^{#(eq%-[%w_-]+)}$')
      if id then
        local r = number(id)
        out:insert(pandoc.Span({m, pandoc.Span({pandoc.Str('(' .. r.n .. ')')}, {class='eqno'})}, {id=id, class='equation'})); i = j + 1
      else out:insert(m); i = i + 1 end
    end
    return out
  end,
}

local render = {
  Str = function(s)
    local id, rest = s.text:match('^@(%a+%-[%w_-]+)(.*)$')
    if id and refs[id] then return {pandoc.Link({pandoc.Str(refs[id].kind .. '\u{a0}' .. refs[id].n)}, '#' .. id), pandoc.Str(rest)} end
  end,
  Table = function(t) -- widths come from the content; a wide table scrolls in a box of its own
    for _, spec in ipairs(t.colspecs) do spec[2] = nil end
    return pandoc.Div({t}, {class='scroll'})
  end,
  Div = function(d)
    local kind = d.classes[1] and d.classes[1]:match('^callout%-(%a+)$')
    if kind and titles[kind] then
      local title, body = {pandoc.Str(titles[kind])}, d.content
      if d.attributes.title then title = pandoc.utils.blocks_to_inlines(pandoc.read(d.attributes.title).blocks)
      elseif body[1] and body[1].t == 'Header' then title = body[1].content; body:remove(1) end
      local fold = d.attributes.collapse
      local out = pandoc.List{pandoc.RawBlock('html', fold and ('<details' .. (fold == 'false' and ' open' or '') .. '><summary class="callout-title">') or '<div class="callout-title">'),
        pandoc.Plain(title), pandoc.RawBlock('html', fold and '</summary>' or '</div>')}
      out:insert(pandoc.Div(body, {class='callout-body'}))
      if fold then out:insert(pandoc.RawBlock('html', '</details>')) end
      return pandoc.Div(out, {class='callout ' .. d.classes[1]})
    elseif d.classes:includes('panel-tabset') then
      count.tabs = (count.tabs or 0) + 1
      local out, n, body = pandoc.List(), 0, nil
      local function flush() if body then out:insert(pandoc.Div(body, {class='tab-body'})) end end
      for _, b in ipairs(d.content) do
        if b.t == 'Header' then
          flush(); n, body = n + 1, pandoc.List()
          local id = 'tab-' .. count.tabs .. '-' .. n
          out:insert(pandoc.RawBlock('html', ('<input type="radio" name="tab-%d" id="%s"%s><label for="%s">%s</label>'):format(count.tabs, id, n == 1 and ' checked' or '', id, pandoc.utils.stringify(b.content))))
        elseif body then body:insert(b) end
      end
      flush(); return pandoc.Div(out, {class='tabset'})
    end
  end,
}

function Pandoc(doc) return doc:walk(label):walk(render) end
