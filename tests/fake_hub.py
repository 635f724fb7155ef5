"A Hugging Face hub on loopback: as much of its protocol as huggingface_hub and datasets speak, and every way of failing on demand."
import functools, hashlib, json, re, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class FakeHub:
    """Datasets by revision, served as the hub serves them: `repos['owner/name']['main'] = {'data/0.parquet': b'...'}`.

    `fail` holds (regular expression of 'GET /path', what to do, how many times): 'status' answers so, with 'headers'; 'cut' sends so many bytes of a body
    and drops the line; 'slow' waits so many seconds before each piece; 'wrong' flips a byte. `log` holds every request: method, path, range.
    Large files are sent by another host (localhost), to which the hub redirects; `leaked` counts the requests that came there with a token."""

    def __init__(self):
        self.repos, self.fail, self.log, self.served, self.signed, self.leaked = {}, [], [], Counter(), [], 0
        hub = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *args): pass
            def do_GET(self): hub.answer(self)
            do_HEAD = do_POST = do_GET
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()

    def close(self): self.server.shutdown(); self.server.server_close()
    def add(self, name, files, revision='main'): self.repos.setdefault(name, {})[revision] = dict(files)
    def times(self, pattern): return sum(bool(re.search(pattern, f'{m} {p}')) for m, p, _ in self.log)

    def broken(self, request):
        "What is to go wrong with this request."
        for rule in self.fail:
            if rule['times'] and re.search(rule['on'], request):
                rule['times'] -= 1
                return rule
        return {}

    def will(self, on, times=1, **how): self.fail.append(dict(on=on, times=times, **how))

    # --- one request

    def answer(self, h):
        at = urlsplit(h.path)
        path, query = unquote(at.path), parse_qs(at.query)
        body = h.rfile.read(int(h.headers.get('Content-Length') or 0))
        if m := re.fullmatch(r'/signed/(\d+)', path):
            self.leaked += 'Authorization' in h.headers
            return self.resolve(h, *self.signed[int(m[1])], True)
        self.log.append((h.command, path, h.headers.get('Range')))
        rule = self.broken(f'{h.command} {path}')
        if 'status' in rule: return self.send(h, rule['status'], b'{"error": "as told"}', rule.get('headers', {}))
        if m := re.fullmatch(r'/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.*))?', path): return self.api(h, m[1], m[2], m[3] or 'main', body, query)
        if m := re.fullmatch(r'/datasets/([^/]+/[^/]+)/resolve/([^/]+|refs/convert/[^/]+)/(.*)', path): return self.resolve(h, m[1], m[2], m[3], rule)
        self.send(h, 404, b'{"error": "no such page"}')

    def revision(self, name, wanted):
        "The name and commit of a revision, or None."
        return next(((r, sha(files)) for r, files in self.repos[name].items() if wanted in (r, sha(files))), None)

    def api(self, h, name, what, rest, body, query):
        if name not in self.repos: return self.send(h, 401, b'{"error": "Repository not found"}', {'X-Error-Code': 'RepoNotFound'}) # as the hub does: it does not tell
        wanted, _, folder = rest.partition('/') if what == 'tree' else (rest, '', '')
        found = self.revision(name, wanted)
        if not found: return self.send(h, 404, b'{"error": "Invalid rev id"}', {'X-Error-Code': 'RevisionNotFound'})
        files, commit = self.repos[name][found[0]], found[1]
        if what in (None, 'revision'): return self.send(h, 200, dict(id=name, sha=commit, siblings=[dict(rfilename=f) for f in files], private=False, gated=False, disabled=False, tags=[], downloads=0, likes=0))
        if what == 'paths-info':
            paths = parse_qs(body.decode())['paths']
            return self.send(h, 200, [entry(f, files[f]) for f in paths if f in files] + [dict(type='directory', path=p, oid='0'*40, size=0) for p in paths if is_folder(p, files)])
        if folder and not is_folder(folder, files): return self.send(h, 404, b'{"error": "not found"}', {'X-Error-Code': 'EntryNotFound'})
        below = [f for f in files if not folder or f.startswith(folder+'/')]
        depth = len(folder.split('/')) if folder else 0
        folders = sorted({'/'.join(f.split('/')[:d]) for f in below for d in range(depth+1, len(f.split('/')))})
        out = [dict(type='directory', path=f, oid='0'*40, size=0) for f in folders] + [entry(f, files[f]) for f in below]
        self.send(h, 200, [e for e in out if query.get('recursive') == ['true'] or len(e['path'].split('/')) == depth+1])

    def resolve(self, h, name, wanted, file, rule, signed=False):
        found = name in self.repos and self.revision(name, wanted)
        if not found: return self.send(h, 404 if name in self.repos else 401, b'', {'X-Error-Code': 'RevisionNotFound' if name in self.repos else 'RepoNotFound'})
        data = self.repos[name][found[0]].get(file)
        head = {'X-Repo-Commit': found[1], 'Accept-Ranges': 'bytes'}
        if data is None: return self.send(h, 404, b'Entry not found', head | {'X-Error-Code': 'EntryNotFound'})
        head |= {'ETag': f'"{oid(file, data)}"', 'X-Linked-Size': str(len(data)), 'X-Linked-Etag': f'"{oid(file, data)}"'}
        if is_large(file) and not signed:
            self.signed.append((name, wanted, file, rule))
            return self.send(h, 302, b'', head | {'Location': f'http://localhost:{self.server.server_port}/signed/{len(self.signed)-1}'})
        first, last, status = 0, len(data), 200
        if m := re.fullmatch(r'bytes=(\d*)-(\d*)', h.headers.get('Range') or ''):
            if rule.get('ranges') != 'ignored':
                first, last = (int(m[1]), int(m[2] or len(data)-1)+1) if m[1] else (max(0, len(data)-int(m[2])), len(data))
                if first >= len(data): return self.send(h, 416, b'', head)
                status, head = 206, head | {'Content-Range': f'bytes {first}-{last-1}/{len(data)}'}
        piece = data[first:last]
        if rule.get('wrong'): piece = bytes([piece[0]^1])+piece[1:]
        if h.command == 'GET': self.served[file] += min(len(piece), rule.get('cut', len(piece)))
        self.send(h, status, piece, head, rule)

    def send(self, h, status, body=b'', headers={}, rule={}):
        if not isinstance(body, bytes): body, headers = json.dumps(body).encode(), headers | {'Content-Type': 'application/json'}
        h.send_response(status)
        for k, v in (headers | {'Content-Length': str(len(body))}).items(): h.send_header(k, v)
        h.end_headers()
        if h.command == 'HEAD': return
        cut = rule.get('cut', len(body))
        try:
            for i in range(0, cut, 1 << 14):
                if rule.get('slow'): time.sleep(rule['slow'])
                h.wfile.write(body[i:min(i+(1 << 14), cut)])
                h.wfile.flush()
        except OSError: pass # the other side went away
        if cut < len(body): h.close_connection = True; h.connection.shutdown(2)


def is_large(file): return file.endswith(('.parquet', '.gz', '.zst')) # kept in LFS, known by the sha256 of the content; others by that of git
@functools.lru_cache
def oid(file, data): return hashlib.sha256(data).hexdigest() if is_large(file) else hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
def sha(files): return hashlib.sha1(json.dumps(sorted((f, oid(f, d)) for f, d in files.items())).encode()).hexdigest()
def is_folder(path, files): return any(f.startswith(path+'/') for f in files)


def entry(file, data):
    about = dict(type='file', path=file, size=len(data), oid=oid('', data))
    return about | (dict(lfs=dict(oid=oid(file, data), size=len(data), pointerSize=134)) if is_large(file) else {})
