"""Speed of the loader beside raw files and four libraries: one run, one core, the same tokens, the readers taking turns.

    python tests/bench/loader.py [--python PYTHON ...] [--path FOLDER] [--rounds 15] [--json FILE]

Every reader fills batches of 16,384 tokens, int64 tensors [B, T], from rows that lie in files in the page cache, shuffled. Each is a process of its
own, all of them bound to one CPU, one thread for numpy and torch; they take turns, a round each, an epoch or `--batches`. What counts is CPU time of
the whole process (all its threads), so other work on the machine matters little; time on the wall is given beside it. Before the first round each
reader's tokens are compared with the rows of our cache: a library that gives other tokens is reported as wrong and not measured.

- `gather`: the rows of a uint16 memmap in one numpy call: the best that a raw file can do. Tokens only (x).
- `get_batch`: as nanoGPT reads, a slice for each row at random places; `x` from a memmap that stays open, `x, y` as it ships, the memmap opened anew.
- ours: tokens, targets, loss weights and document numbers; each file's checksum and digest verified; at least two windows, so that every chunk is
  read, decoded and checked in every epoch, and that is part of the time. No background thread here: it would hide work, not save it.
- litdata, MosaicML streaming, Grain, HF datasets: tokens only. What they give is stacked into int64 by the quickest way that we found for each; `arrow by
  hand` takes rows from the table and reads their buffer as numpy, past the conversions that HF datasets offers.

The libraries do not install beside each other (streaming wants numpy < 2.2), so each may have an environment of its own, with torch beside it:
`litdata`; `mosaicml-streaming`; `grain`; `datasets`. Name their interpreters after --python; this interpreter is always asked too. What none of
them has is skipped with a line that says so. streaming imports torchvision, for pictures: where that does not import, an empty one takes its place.
"""
import argparse, functools, importlib.machinery, itertools, json, os, statistics, subprocess, sys, tempfile, time, types
from pathlib import Path
import numpy as np, torch

TOKENS = 16_384 # in a batch
LENGTHS = 512, 2048

# Every reader is a function of (folder to write to, table [N, T] uint16, B, the interpreter's own room) that gives
# an endless iterator of batches, and the bytes that the data takes on disk.

def int64(rows)->torch.Tensor: return torch.from_numpy(np.stack(rows).astype(np.int64))

def forever(epoch):
    "All batches of `epoch()`, again and again."
    while True: yield from epoch()

def size(folder:Path)->int: return sum(p.stat().st_size for p in Path(folder).rglob('*') if p.is_file())

def gather(job):
    table, B = job.table, job.B
    def epoch():
        order = np.random.permutation(len(table))
        for i in range(0, len(table), B): yield torch.from_numpy(table[order[i:i+B]].astype(np.int64))
    return forever(epoch), table.nbytes

def get_batch(job, targets:bool):
    T, B, path = job.T, job.B, job.room/'raw.bin'
    raw = np.memmap(path, np.uint16, 'r')
    def batch():
        data = np.memmap(path, np.uint16, 'r') if targets else raw
        ix = torch.randint(len(data)-T, (B,))
        x = torch.stack([torch.from_numpy(data[i:i+T].astype(np.int64)) for i in ix])
        return (x, torch.stack([torch.from_numpy(data[i+1:i+1+T].astype(np.int64)) for i in ix])) if targets else x
    return iter(batch, None), path.stat().st_size

def ours(job, codec:str):
    from llmlab.packing.cache import Cache
    from llmlab.packing.loader import Loader, window_chunks
    cache = Cache(Path((job.room/f'{codec}.path').read_text()))
    window = min(window_chunks(cache), max(1, len(cache.chunks)//2)) # at least two windows
    return Loader(cache, job.B, seed=0, workers=0, window=window), cache.file_bytes

def litdata_blocks(table, per:int, i:int):
    for row in table[i*per:(i+1)*per]: yield torch.from_numpy(row.copy())

def litdata(job, dataset_only:bool):
    import litdata
    folder, per = job.room/'litdata', (1 << 22)//job.T # rows in a chunk: 8 MiB, whole rows
    if not folder.exists():
        from litdata.streaming.writer import BinaryWriter
        from litdata.streaming.item_loader import TokensLoader
        writer = BinaryWriter(str(folder), chunk_size=per*job.T, item_loader=TokensLoader(job.T))
        for i, row in enumerate(job.table): writer[i] = torch.from_numpy(row.copy())
        writer.done(); writer.merge()
    data = litdata.StreamingDataset(str(folder), item_loader=litdata.TokensLoader(block_size=job.T), shuffle=True, drop_last=False, seed=0)
    assert len(data) == len(job.table), (len(data), len(job.table))
    if not dataset_only: return forever(lambda: iter(litdata.StreamingDataLoader(data, batch_size=job.B, num_workers=0, collate_fn=lambda rows: torch.stack(rows).long()))), size(folder)
    def epoch():
        rows = (row for row in data) # (an iterator of its own: `islice` would begin the data set anew)
        while part := list(itertools.islice(rows, job.B)): yield torch.stack(part).long()
    return forever(epoch), size(folder)

def streaming(job):
    try: import torchvision
    except Exception: # RuntimeError with a torch that it was not built for
        for name in ('torchvision', 'torchvision.transforms', 'torchvision.transforms.functional', 'torchvision.datasets'):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules['torchvision.transforms.functional'].to_tensor = None
        sys.modules['torchvision.datasets'].VisionDataset = object
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    clean_stale_shared_memory()
    folder = job.room/'streaming'
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={'tokens': f'ndarray:uint16:{job.T}'}, size_limit=1 << 23) as out:
            for row in job.table: out.write({'tokens': row})
    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=job.B, shuffle_seed=0)
    loader = torch.utils.data.DataLoader(data, batch_size=job.B, num_workers=0, collate_fn=lambda rows: int64([r['tokens'] for r in rows]))
    return forever(lambda: iter(loader)), size(folder)

def grain(job):
    import grain
    class Rows:
        def __len__(self): return len(job.table)
        def __getitem__(self, i): return job.table[i]
    data = grain.MapDataset.source(Rows()).seed(0).shuffle().batch(job.B)
    def epoch():
        for i in range(len(data)): yield torch.from_numpy(data[i].astype(np.int64))
    return forever(epoch), job.table.nbytes

def datasets(job, form:str):
    import datasets
    folder = job.room/'datasets'
    if not folder.exists():
        features = datasets.Features({'tokens': datasets.Sequence(datasets.Value('uint16'), length=job.T)})
        def rows():
            for i in range(0, len(job.table), 1000): yield from ({'tokens': r} for r in job.table[i:i+1000])
        datasets.Dataset.from_generator(rows, features=features, cache_dir=str(job.room/'datasets-built')).save_to_disk(str(folder))
    data = datasets.load_from_disk(str(folder)).with_format(form)
    def epoch():
        order = np.random.permutation(len(data))
        for i in range(0, len(data), job.B):
            rows = data[order[i:i+job.B]]['tokens']
            if form == 'arrow': rows = rows.combine_chunks().flatten().to_numpy().reshape(-1, job.T)
            yield rows.long() if form == 'torch' else torch.from_numpy(np.asarray(rows).astype(np.int64))
    return forever(epoch), size(folder)

X, ALL = 'x', 'x, y, weights, documents; checked'
READERS = { # name -> (what it needs, what it gives, function)
    'uint16 memmap, one gather': (None, X, gather),
    'get_batch of nanoGPT, x only': (None, X, functools.partial(get_batch, targets=False)),
    'get_batch of nanoGPT, as shipped': (None, 'x, y', functools.partial(get_batch, targets=True)),
    'llmlab, none': ('llmlab', ALL, functools.partial(ours, codec='none')),
    'llmlab, lz4': ('llmlab', ALL, functools.partial(ours, codec='lz4')),
    'litdata, dataset iterated': ('litdata', X, functools.partial(litdata, dataset_only=True)),
    'litdata, StreamingDataLoader': ('litdata', X, functools.partial(litdata, dataset_only=False)),
    'MosaicML streaming, MDS': ('streaming', X, streaming),
    'Grain, MapDataset': ('grain', X, grain),
    'HF datasets, arrow by hand': ('datasets', X, functools.partial(datasets, form='arrow')),
    'HF datasets, numpy': ('datasets', X, functools.partial(datasets, form='numpy')),
    'HF datasets, torch': ('datasets', X, functools.partial(datasets, form='torch')),
}
PACKAGE = {'litdata': 'litdata', 'streaming': 'mosaicml-streaming', 'grain': 'grain', 'datasets': 'datasets', 'llmlab': 'llmlab'}
BASE, SHIPPED = 'get_batch of nanoGPT, x only', 'get_batch of nanoGPT, as shipped'

class Job:
    "What a reader is given."
    def __init__(self, room:str, T:int):
        self.room, self.T, self.B = Path(room), T, TOKENS//T
        self.table = np.memmap(self.room/'rows.bin', np.uint16, 'r').reshape(-1, T)

def check(name:str, job:Job, batches)->None:
    "One epoch: every row once, as it lies in the table."
    key = lambda rows: np.ascontiguousarray(rows).view(np.dtype((np.void, rows.dtype.itemsize*rows.shape[1]))).ravel()
    if name.startswith('get_batch'): return # its rows begin anywhere
    if name.startswith('llmlab'):
        seen = []
        for b in itertools.islice(batches, batches.rows_per_epoch//job.B):
            known = b.rows.numpy() < len(job.table)
            assert np.array_equal(b.tokens.numpy()[known], job.table[b.rows.numpy()[known]].astype(np.int64)), 'other tokens'
            assert torch.equal(b.tokens[:, 1:], b.targets[:, :-1]), 'targets are not the next tokens'
            seen.append(b.rows.numpy())
        assert len(np.unique(np.concatenate(seen))) == batches.rows_per_epoch//job.B*job.B, 'a row came twice'
        return
    got = torch.cat(list(itertools.islice(batches, len(job.table)//job.B)))
    assert got.dtype == torch.int64 and got.shape == job.table.shape, f'{got.dtype} {tuple(got.shape)} instead of {job.table.shape}'
    first = got[:64].numpy().astype(np.uint16)
    assert not np.array_equal(first, job.table[:64]), 'not shuffled'
    assert np.array_equal(np.sort(key(got.numpy().astype(np.uint16))), np.sort(key(np.asarray(job.table)))), 'other tokens'

def serve(name:str, room:str, T:int)->None:
    "A reader in its own process: a number of batches on stdin, the seconds that they took on stdout."
    say, sys.stdout = sys.stdout, sys.stderr # libraries print
    torch.set_num_threads(1); torch.manual_seed(0); np.random.seed(0)
    job = Job(room, T)
    batches, num_bytes = READERS[name][2](job)
    check(name, job, batches)
    version = __import__(READERS[name][0]).__version__ if READERS[name][0] else ''
    print(json.dumps(dict(bytes=num_bytes, version=version, numpy=np.__version__, torch=torch.__version__)), file=say, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)): next(batches)
        print(json.dumps([time.process_time()-cpu, time.perf_counter()-wall]), file=say, flush=True)
    os._exit(0) # background threads of libraries do not matter any more

def pythons(names:list[str])->dict[str,str]:
    "Who has what: package -> interpreter, the first that has it."
    out = {}
    for python in [sys.executable, *names]:
        ask = f'import importlib.util as u; print(*(p for p in {list(PACKAGE)!r} if u.find_spec(p) and u.find_spec("torch")))'
        for package in subprocess.run([python, '-c', ask], capture_output=True, text=True, check=True).stdout.split(): out.setdefault(package, python)
    return out

def start(python:str, name:str, room:Path, T:int)->tuple[subprocess.Popen, dict]:
    "A reader's process, checked and waiting. Raises RuntimeError with its last words."
    env = os.environ | {k: '1' for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'HF_HUB_OFFLINE', 'HF_DATASETS_DISABLE_PROGRESS_BARS')}
    log = open(room/f'{name.replace(" ", "_")}.log', 'w+')
    child = subprocess.Popen([python, __file__, '--serve', name, '--room', str(room), '--seq-len', str(T)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
    line = child.stdout.readline()
    if line: return child, json.loads(line)
    child.wait(); log.seek(0)
    raise RuntimeError((log.read().strip() or f'exit code {child.returncode}').splitlines()[-1])

def make(room:Path, T:int, args)->dict:
    "The caches and the raw files of one row length; what they are."
    from llmlab import config
    from llmlab.data.corpora import open_corpus
    from llmlab.data.tokenizer import build_tokenizer
    from llmlab.packing.cache import build_cache
    torch.set_num_threads(1)
    where = dict(name='files', path=args.path) if args.path else dict(name='python')
    corpus = open_corpus(config.Data(**where, validation_fraction=0., max_documents=args.documents))
    tokenizer = build_tokenizer(config.Tokenizer(vocab_size=args.vocab, train_megabytes=10), corpus)
    caches = {c: build_cache(corpus, tokenizer, config.Packing(seq_len=T, chunk_rows=8192*512//T, codec=c, folder=str(room))) for c in ('lz4', 'none')}
    for codec, cache in caches.items(): (room/f'{codec}.path').write_text(str(cache.path))
    cache, B = caches['none'], TOKENS//T
    left = cache.num_rows//B*B # whole batches
    with open(room/'rows.bin', 'wb') as rows, open(room/'raw.bin', 'wb') as raw:
        for i in range(len(cache.chunks)):
            tokens = cache.chunk(i).tokens.astype(np.uint16, copy=False)
            tokens.tofile(raw)
            tokens[:left, :T].tofile(rows)
            left -= len(tokens[:left])
    return dict(seq_len=T, tokens=cache.num_tokens, rows=cache.num_rows, batches=cache.num_rows//B, fill=cache.fill, chunks=len(cache.chunks),
        documents=cache.num_documents, about=repr(cache))

def race(children:dict, batches:int, rounds:int)->dict:
    "Seconds of every reader in every round after the first: [[cpu, wall], ...]."
    seconds = {name: [] for name in children}
    for r, (name, child) in itertools.product(range(rounds+1), children.items()):
        print(batches, file=child.stdin, flush=True)
        took = json.loads(child.stdout.readline())
        if r: seconds[name].append(took)
    return seconds

def rows_of(seconds:dict, info:dict, made:dict)->list[dict]:
    "The table of one row length, as numbers."
    rate = {name: [made['race_batches']*TOKENS/cpu for cpu, _ in took] for name, took in seconds.items()}
    out = []
    for name, r in rate.items():
        against = lambda base: [a/b for a, b in zip(r, rate[base], strict=True)]
        x, xy = against(BASE), against(SHIPPED)
        tokens = made['tokens'] if name.startswith('llmlab') else made['batches']*TOKENS if READERS[name][0] or 'gather' in name else made['rows']*(made['seq_len']+1)
        out.append(dict(reader=name, gives=READERS[name][1], **info[name], tokens_per_cpu_second=statistics.median(r),
            tokens_per_second=statistics.median(made['race_batches']*TOKENS/wall for _, wall in seconds[name]), core_at_200k=200_000/statistics.median(r),
            bytes_per_token=info[name]['bytes']/tokens, ratio=statistics.median(x), low=min(x), high=max(x), ratio_shipped=statistics.median(xy), low_shipped=min(xy), high_shipped=max(xy)))
    return out

def show(made:dict, rows:list[dict])->None:
    print(f'\nT={made["seq_len"]}: {made["about"]}; {made["race_batches"]:,} batches a round\n')
    print('| reader | gives | M tokens/s of CPU time | on the wall | of a core at 200k tokens/s | bytes a token | x get_batch, x only (low to high) | x get_batch as shipped (low to high) |')
    print('|---|---|---:|---:|---:|---:|---:|---:|')
    for r in sorted(rows, key=lambda r: -r['ratio']):
        version = f' {r["version"]}' if r['version'] and not r['reader'].startswith('llmlab') else ''
        first, *rest = r['reader'].split(',')
        print(f'| {",".join([first+version, *rest])} | {r["gives"]} | {r["tokens_per_cpu_second"]/1e6:,.1f} | {r["tokens_per_second"]/1e6:,.1f} | {r["core_at_200k"]:.2%} | {r["bytes_per_token"]:.2f} '
            f'| {r["ratio"]:.2f} ({r["low"]:.2f} to {r["high"]:.2f}) | {r["ratio_shipped"]:.2f} ({r["low_shipped"]:.2f} to {r["high_shipped"]:.2f}) |')

def measure(T:int, args, who:dict)->dict:
    children, info = {}, {}
    with tempfile.TemporaryDirectory(dir=args.folder) as room:
        made = make(Path(room), T, args)
        every = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {args.cpu}) # children are born with it
        made['race_batches'] = min(args.batches or made['batches'], made['batches'])
        try:
            for name, (needs, _, _) in READERS.items():
                if args.only and not any(o in name for o in args.only) and name not in (BASE, SHIPPED): continue
                if needs and needs not in who: print(f'skipped: {name}: no interpreter has {PACKAGE[needs]}; see --python'); continue
                try: children[name], info[name] = start(who.get(needs, sys.executable), name, Path(room), T)
                except RuntimeError as e: print(f'skipped: {name}: {e}')
            seconds = race(children, made['race_batches'], args.rounds)
        finally:
            for child in children.values(): child.stdin.close(); child.wait()
            os.sched_setaffinity(0, every)
    out = made | {'table': rows_of(seconds, info, made)}
    show(made, out['table'])
    return out

def main()->None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--python', nargs='*', default=[], help='interpreters that have the libraries')
    p.add_argument('--path', help='text to read: a file or folder of txt, jsonl, parquet; default: the sources of this Python')
    p.add_argument('--documents', type=int, help='at most so many documents of it')
    p.add_argument('--vocab', type=int, default=32_768, help='size of the vocabulary that is trained on it')
    p.add_argument('--seq-len', type=int, nargs='*', default=LENGTHS, help='row lengths')
    p.add_argument('--rounds', type=int, default=15, help='turns of each reader')
    p.add_argument('--batches', type=int, help='batches of a turn; default: an epoch')
    p.add_argument('--only', nargs='*', help='readers whose name has one of these in it')
    p.add_argument('--cpu', type=int, default=max(os.sched_getaffinity(0)), help='the CPU that all readers share')
    p.add_argument('--folder', help='where to keep the files meanwhile; default: where temporary files go')
    p.add_argument('--json', type=Path, help='write the numbers here too')
    p.add_argument('--serve', help=argparse.SUPPRESS)
    p.add_argument('--room', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve: return serve(args.serve, args.room, args.seq_len[0])
    who = pythons(args.python)
    results = [measure(T, args, who) for T in args.seq_len]
    if args.json: args.json.write_text(json.dumps(results, indent=1))

if __name__ == '__main__': main()
