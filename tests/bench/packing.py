"""Packing: how full the rows get, what happens to the documents, and how fast; ours beside TRL's `pack_dataset`, in one run, taking turns.

    python tests/bench/packing.py [--python PYTHON] [--million 20] [--rounds 5] [--json FILE]

The documents are the same for all: the sources of this Python, tokenised, and `web`: random tokens in lengths like those of FineWeb (lognormal,
median 620, mean 1,030). All rows store T+1 tokens. Ours packs chunk by chunk, 4.2 million tokens each, as the cache does; `plan` only finds the row
of each piece, the other number is `pack`: rows, spans and all. TRL packs batches of 1,000 documents, as it does by itself, or what its name says;
`without datasets` is its function for one arrow table, which leaves out reading and writing the data set. CPU seconds of the process, on one CPU.

- fill: share of the slots that hold a token. Kept: share of the tokens that are in a row at all.
- cut: of the documents that a row could hold, those that lie in more than one.

TRL may have an environment of its own (`trl`, `torch`): name its interpreter after --python. It is skipped with a line that says so where nobody has it.
"""
import argparse, itertools, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np

CHUNK = 8192*512 # tokens
OURS = 'best_fit', 'first_fit', 'concat'
TRL = { # name -> (strategy, documents in a batch, through datasets)
    'bfd_split': ('bfd_split', 1000, True), 'bfd_split, batches of 10,000': ('bfd_split', 10_000, True), 'bfd_split, all at once, without datasets': ('bfd_split', None, False),
    'bfd': ('bfd', 1000, True), 'wrapped': ('wrapped', 1000, True),
}
BASE = 'TRL bfd_split'

def chunks(lengths):
    "Ranges of documents of `CHUNK` tokens."
    number = (np.cumsum(lengths)-lengths)//CHUNK
    edges = [0, *(np.flatnonzero(np.diff(number))+1).tolist(), len(lengths)]
    return list(zip(edges[:-1], edges[1:]))

def told(pairs, lengths, row_tokens:int, rows:int, stored:int, kept:int)->dict:
    "What became of the documents; `pairs`: document and row of every piece."
    rows_of = np.bincount(np.unique(pairs, axis=0)[:, 0], minlength=len(lengths))
    fits = lengths <= row_tokens
    return dict(rows=rows, fill=stored/(rows*row_tokens), kept=kept/int(lengths.sum()), cut=float((rows_of[fits] > 1).sum()/max(fits.sum(), 1)))

def ours(name:str, documents, lengths, row_tokens:int):
    "What can be timed, and what became of the documents."
    from llmlab.packing.packer import FITS, concat, cut, pack
    parts = chunks(lengths)
    def plan():
        for a, b in parts:
            if name == 'concat': concat(lengths[a:b], row_tokens)
            else: FITS[name](cut(lengths[a:b], row_tokens)[2], row_tokens)
    def whole(): return [pack(documents[a:b], row_tokens, name) for a, b in parts]
    packed, first, pairs = whole(), 0, []
    for p, (a, b) in zip(packed, parts):
        row = np.repeat(np.arange(p.num_rows), np.diff(p.row_spans))+first
        pairs.append(np.stack([p.document+a, row], 1)); first += p.num_rows
    stored = sum(p.num_tokens for p in packed)
    again = sum(int((p.start > 0).sum()) for p in packed) # tokens that are in two pieces
    return {'plan': plan, 'whole': whole}, told(np.concatenate(pairs), lengths, row_tokens, first, stored, stored-again)

def theirs(name:str, documents, lengths, row_tokens:int):
    import pyarrow as pa, trl, datasets
    from trl.data_utils import _pack_bfd
    datasets.disable_progress_bars()
    datasets.disable_caching()
    strategy, batch, through = TRL[name]
    flat, offsets = np.concatenate(documents), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    table = pa.table({'input_ids': pa.ListArray.from_arrays(offsets, flat)})
    def pack_these(table):
        if not through: return _pack_bfd(table, row_tokens, 'split')
        return trl.pack_dataset(datasets.Dataset(datasets.table.InMemoryTable(table)), row_tokens, strategy, {'batch_size': batch}).data.table
    numbered = pack_these(table.append_column('doc', pa.ListArray.from_arrays(offsets, np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)))).combine_chunks()
    doc = numbered['doc'].combine_chunks()
    sizes = doc.value_lengths().to_numpy()
    row, kept = np.repeat(np.arange(len(sizes)), sizes), int(sizes.sum())
    pairs = np.stack([doc.flatten().to_numpy(), row], 1)
    change = np.concatenate([[True], (np.diff(pairs, axis=0) != 0).any(1)])
    if strategy != 'bfd': # not a token lost or changed
        got = numbered['input_ids'].combine_chunks().flatten().to_numpy()
        assert np.array_equal(np.bincount(got), np.bincount(flat)), 'other tokens'
    return {'whole': lambda: pack_these(table)}, told(pairs[change], lengths, row_tokens, len(sizes), kept, kept)

def serve(name:str, room:str, row_tokens:int)->None:
    "One way of packing in its own process: a word on stdin, the seconds that it took on stdout."
    say, sys.stdout = sys.stdout, sys.stderr
    lengths, flat = np.load(Path(room)/'lengths.npy'), np.load(Path(room)/'tokens.npy')
    documents = np.split(flat, np.cumsum(lengths)[:-1])
    functions, about = (theirs(name[4:], documents, lengths, row_tokens) if name.startswith('TRL ') else ours(name[7:], documents, lengths, row_tokens))
    if name.startswith('TRL '): import trl; about['version'] = trl.__version__
    print(json.dumps(about), file=say, flush=True)
    for line in sys.stdin:
        took = {}
        for what, f in functions.items():
            began = time.process_time(); f(); took[what] = time.process_time()-began
        print(json.dumps(took), file=say, flush=True)

def start(python:str, name:str, room:Path, row_tokens:int)->tuple[subprocess.Popen, dict]:
    env = os.environ | {k: '1' for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'HF_HUB_OFFLINE')}
    child = subprocess.Popen([python, __file__, '--serve', name, '--room', str(room), '--seq-len', str(row_tokens-1)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    line = child.stdout.readline()
    if not line: raise SystemExit(f'{name} ended with code {child.wait()}')
    return child, json.loads(line)

def python_documents(vocab:int)->list[np.ndarray]:
    from llmlab import config
    from llmlab.data.corpora import open_corpus
    from llmlab.data.tokenizer import build_tokenizer
    from llmlab.packing.cache import tokenize
    corpus = open_corpus(config.Data(name='python', validation_fraction=0.))
    return tokenize(list(corpus.iterate('train')), build_tokenizer(config.Tokenizer(vocab_size=vocab, train_megabytes=10), corpus))

def web_documents(num_tokens:int)->list[np.ndarray]:
    draw = np.random.default_rng(0)
    lengths = np.maximum(2, draw.lognormal(6.43, 1.0076, num_tokens//1030).astype(np.int64)) # e^6.43 = 620; mean: e^(6.43+1.0076^2/2) = 1,030
    return np.split(draw.integers(0, 32_768, int(lengths.sum()), dtype=np.uint16), np.cumsum(lengths)[:-1])

def measure(what:str, documents, T:int, python:str|None, rounds:int)->dict:
    lengths, children, about = np.array([len(d) for d in documents]), {}, {}
    names = [*(f'llmlab {n}' for n in OURS), *(f'TRL {n}' for n in TRL if python)]
    with tempfile.TemporaryDirectory() as room:
        np.save(Path(room)/'lengths.npy', lengths); np.save(Path(room)/'tokens.npy', np.concatenate(documents))
        try:
            for n in names: children[n], about[n] = start(python if n.startswith('TRL') else sys.executable, n, Path(room), T+1)
            seconds = {n: [] for n in names}
            for r, n in itertools.product(range(rounds+1), names):
                print('go', file=children[n].stdin, flush=True)
                took = json.loads(children[n].stdout.readline())
                if r: seconds[n].append(took) # the first round warms up
        finally:
            for c in children.values(): c.stdin.close(); c.wait()
    tokens, table = int(lengths.sum()), []
    for n in names:
        ratio = [b['whole']/s['whole'] for s, b in zip(seconds[n], seconds[BASE], strict=True)] if BASE in seconds else []
        speed = {k: tokens/statistics.median(s[k] for s in seconds[n]) for k in seconds[n][0]}
        table.append(dict(name=n, **about[n], speed=speed, ratio=ratio))
    out = dict(documents=what, count=len(lengths), tokens=tokens, mean=float(lengths.mean()), median=float(np.median(lengths)), seq_len=T, table=table)
    show(out)
    return out

def show(of:dict)->None:
    print(f'\n{of["documents"]}: {of["count"]:,} documents, {of["tokens"]:,} tokens, mean {of["mean"]:,.0f}, median {of["median"]:,.0f}; rows of {of["seq_len"]+1}\n')
    print('| packing | rows | fill | tokens kept | documents cut that fit | plan, M tokens/s | with rows, M tokens/s | x TRL bfd_split (low to high) |')
    print('|---|---:|---:|---:|---:|---:|---:|---:|')
    for r in of['table']:
        ratio = f'{statistics.median(r["ratio"]):.1f} ({min(r["ratio"]):.1f} to {max(r["ratio"]):.1f})' if r['ratio'] else ''
        plan = f'{r["speed"]["plan"]/1e6:,.0f}' if 'plan' in r['speed'] else ''
        name = r['name'].replace('TRL', f'TRL {r["version"]}') if 'version' in r else r['name']
        print(f'| {name} | {r["rows"]:,} | {r["fill"]:.2%} | {r["kept"]:.1%} | {r["cut"]:.1%} | {plan} | {r["speed"]["whole"]/1e6:,.0f} | {ratio} |', flush=True)

def main()->None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--python', nargs='*', default=[], help='interpreters that may have trl')
    p.add_argument('--million', type=float, default=20, help='million tokens of `web`')
    p.add_argument('--vocab', type=int, default=32_768, help='vocabulary for the sources of this Python')
    p.add_argument('--seq-len', type=int, nargs='*', default=(512, 2048), help='T')
    p.add_argument('--rounds', type=int, default=5, help='turns of each')
    p.add_argument('--cpu', type=int, default=max(os.sched_getaffinity(0)), help='the CPU that all share')
    p.add_argument('--json', type=Path, help='write the numbers here too')
    p.add_argument('--serve', help=argparse.SUPPRESS)
    p.add_argument('--room', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve: return serve(args.serve, args.room, args.seq_len[0]+1)
    os.sched_setaffinity(0, {args.cpu})
    python = next((x for x in [sys.executable, *args.python] if subprocess.run([x, '-c', 'import importlib.util as u; exit(not u.find_spec("trl"))']).returncode == 0), None)
    if not python: print('skipped: TRL: no interpreter has trl; see --python')
    kinds = {'python': python_documents(args.vocab), 'web': web_documents(int(args.million*1e6))}
    results = [measure(what, documents, T, python, args.rounds) for T in args.seq_len for what, documents in kinds.items()]
    if args.json: args.json.write_text(json.dumps(results, indent=1))

if __name__ == '__main__': main()
