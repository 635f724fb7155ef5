"""Time and memory of building a large cache from parquet files, through `llmlab_prepare`.

    python tests/bench/build.py [--million 200] [--workers 0 2] [--seq-len 512] [--folder FOLDER] [--json FILE]

First it writes the text, which is not timed: documents cut from the sources of this Python, their lengths drawn from the distribution of web pages
(lognormal, median 620 tokens, mean 1,030), in each document other words exchanged for others, every fifth document stories instead; in several
parquet files of many row groups. Then, for each number of workers, `llmlab_prepare data.name=files` runs as a process of its own on an empty cache.

Memory is that of the process and of all its children together: the sum of their PSS (what they share is counted once), looked at ten times a second;
page cache is not in it, pages of mapped files are. `largest` is the largest resident set of one process, as the kernel keeps it (ru_maxrss).
"""
import argparse, json, os, random, re, resource, subprocess, sys, tempfile, threading, time
from pathlib import Path

LIMIT = 1.5 # GB: what the build has to stay below
BYTES = 4.2 # of text for a token, about

def documents(num_bytes:int, seed:int=0):
    "Texts, until they hold so many bytes. A pure function of its arguments and this Python's library."
    from llmlab.config import Data
    from llmlab.data.corpora import open_corpus, story
    draw = random.Random(seed)
    texts = [t for t, _ in open_corpus(Data(name='python', validation_fraction=0.)).texts(0) if len(t) > 2000]
    words = sorted({w for t in texts[:400] for w in re.findall(r'[a-z]{4,12}', t)})
    word, left, stories = re.compile(r'[a-z]{4,12}'), num_bytes, 0
    while left > 0:
        size = min(400_000, int(BYTES*draw.lognormvariate(6.43, 1.01)) + 20) # median 620 tokens, mean 1,030
        if draw.random() < .2:
            parts = []
            while size > 0: parts.append(story(seed, stories).text); size -= len(parts[-1]); stories += 1
            text = '\n\n'.join(parts)
        else:
            source = draw.choice(texts)
            start = draw.randrange(max(1, len(source)-size))
            text, other = source[start:start+size], {}
            def exchange(m)->str: # a word in three becomes another one, the same one throughout the document
                w = m[0]
                if w not in other: other[w] = draw.choice(words) if draw.random() < .33 else w
                return other[w]
            text = word.sub(exchange, text)
        left -= len(text.encode())
        yield text

def write_text(folder:Path, num_bytes:int, files:int)->dict:
    "Parquet files of about equal size, with row groups of 1,000 documents."
    import pyarrow as pa, pyarrow.parquet as pq
    folder.mkdir(parents=True)
    schema, count, size = pa.schema([('id', pa.int64()), ('text', pa.string())]), 0, 0
    for k in range(files):
        with pq.ParquetWriter(folder/f'part-{k:05d}.parquet', schema, compression='snappy') as out:
            rows, texts = [], documents(num_bytes//files, seed=k)
            for text in texts:
                rows.append(text); size += len(text.encode())
                if len(rows) == 1000: out.write_table(pa.table([range(count, count+len(rows)), rows], schema=schema)); count += len(rows); rows = []
            if rows: out.write_table(pa.table([range(count, count+len(rows)), rows], schema=schema)); count += len(rows)
    return dict(documents=count, text_bytes=size, files=files, parquet_bytes=sum(p.stat().st_size for p in folder.glob('*.parquet')))

def family(pid:int)->list[int]:
    "A process and all that descend from it."
    out = [pid]
    for p in out:
        try: out += [int(c) for t in Path(f'/proc/{p}/task').iterdir() for c in (t/'children').read_text().split()]
        except OSError: pass # it has ended
    return out

def memory(pid:int)->tuple[int,int,int,int]: # bytes of PSS, of them anonymous; RSS counted for each process; processes
    "What a process and its descendants hold."
    pss = anonymous = rss = count = 0
    for p in family(pid):
        try: lines = dict(line.split(':', 1) for line in Path(f'/proc/{p}/smaps_rollup').read_text().splitlines()[1:])
        except (OSError, ValueError): continue # it has ended
        get = lambda key: int(lines[key].split()[0])*1024 if key in lines else 0
        pss, anonymous, rss, count = pss+get('Pss'), anonymous+get('Pss_Anon'), rss+get('Rss'), count+1
    return pss, anonymous, rss, count

def build(folder:Path, text:Path, workers:int, args)->dict:
    "One build in a process of its own; what it took."
    cache = folder/f'cache-{workers}'
    tokenizer = [f'tokenizer.vocab_size={args.vocab}', 'tokenizer.train_megabytes=10']
    command = [sys.executable, '-c', 'from llmlab.cli import prepare; prepare()', 'data.name=files', f'data.path={text}', f'packing.folder={cache}',
        f'packing.seq_len={args.seq_len}', f'packing.workers={workers}', *tokenizer]
    peak, before, began = [(0, 0, 0, 0)], resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with open(folder/f'log-{workers}', 'w') as log: child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {'OMP_NUM_THREADS': '1'})
    done, series = threading.Event(), []
    def watch()->None:
        while not done.wait(.1):
            now = memory(child.pid)
            series.append((time.perf_counter()-began, *now))
            if now[0] > peak[0][0]: peak[0] = now
    watcher = threading.Thread(target=watch); watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter()-began
    done.set(); watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode: raise SystemExit((folder/f'log-{workers}').read_text()[-2000:])
    from llmlab.packing.cache import Cache
    caches = [Cache(p.parent) for p in sorted(cache.glob('packed_sequences/*/*/cache_metadata.json'))]
    assert caches and all(c.complete for c in caches), caches
    tokens, text_bytes, size = (sum(getattr(c, k) for c in caches) for k in ('num_tokens', 'text_bytes', 'file_bytes'))
    pss, anonymous, rss, processes = peak[0]
    halves = [max((s[1] for s in series if lo <= s[0] < hi), default=0) for lo, hi in ((0, seconds/2), (seconds/2, seconds+1))]
    return dict(workers=workers, processes=processes, tokens=tokens, documents=sum(c.num_documents for c in caches), text_bytes=text_bytes, seconds=seconds,
        cpu_seconds=usage.ru_utime+usage.ru_stime, megabytes_per_second=text_bytes/seconds/1e6, tokens_per_second=tokens/seconds, pss=pss, anonymous=anonymous, rss=rss,
        largest=usage.ru_maxrss*1024, first_half=halves[0], second_half=halves[1], fill=sum(c.num_tokens for c in caches)/sum(c.num_rows*(c.seq_len+1) for c in caches),
        bytes_per_token=size/tokens, chunks=sum(len(c.chunks) for c in caches), fingerprints=[c.fingerprint for c in caches])

def show(results:list[dict])->None:
    print('| packing.workers | tokens | seconds | CPU seconds | MB/s of text | M tokens/s | memory, all processes, GB | its peak in each half | largest process, GB | fill | bytes a token |')
    print('|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|')
    for r in results:
        print(f'| {r["workers"]} | {r["tokens"]:,} | {r["seconds"]:,.0f} | {r["cpu_seconds"]:,.0f} | {r["megabytes_per_second"]:.1f} | {r["tokens_per_second"]/1e6:.2f} '
            f'| {r["pss"]/1e9:.2f} | {r["first_half"]/1e9:.2f}, {r["second_half"]/1e9:.2f} | {r["largest"]/1e9:.2f} | {r["fill"]:.2%} | {r["bytes_per_token"]:.2f} |', flush=True)

def main()->None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--million', type=float, default=200, help='million tokens, about')
    p.add_argument('--workers', type=int, nargs='*', default=[0, 2], help='packing.workers, a build for each')
    p.add_argument('--seq-len', type=int, default=512, help='packing.seq_len')
    p.add_argument('--vocab', type=int, default=32_768, help='tokenizer.vocab_size')
    p.add_argument('--files', type=int, default=8, help='parquet files')
    p.add_argument('--folder', type=Path, help='where text and caches go, and stay; text that is there is used again; default: removed afterwards')
    p.add_argument('--json', type=Path, help='write the numbers here too')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as room:
        folder = args.folder or Path(room)
        text, about = folder/'text', folder/'text.json'
        if not about.exists():
            made = write_text(text, int(args.million*1e6*BYTES), args.files)
            about.write_text(json.dumps(made))
        made = json.loads(about.read_text())
        print('{documents:,} documents, {0:,.0f} MB of text in {files} parquet files of {1:,.0f} MB together'.format(made['text_bytes']/1e6, made['parquet_bytes']/1e6, **made), flush=True)
        results = [build(folder, text, n, args) for n in args.workers]
        show(results)
        if args.json: args.json.write_text(json.dumps([made, results], indent=1))
        if len({tuple(r['fingerprints']) for r in results}) > 1: raise SystemExit('the caches differ: that must not be')
        if worst := [r for r in results if r['pss'] >= LIMIT*1e9]: raise SystemExit(f'{worst[0]["pss"]/1e9:.2f} GB with {worst[0]["workers"]} workers: the limit is {LIMIT}')

if __name__ == '__main__': main()
