"""Speed of the loader beside a raw memmap, one core, in one process, the readers taking turns.

    python tests/bench/loader.py [--megabytes 24] [--rounds 7]

Every reader fills batches of 16,384 tokens. nanoGPT's `get_batch` gives bare tokens (x), from a memmap that stays open (faster than opening it for
each batch, as nanoGPT does). Ours gives tokens, targets, loss weights and document numbers of shuffled rows, from compressed chunks, checksums
verified; every chunk is decoded once an epoch, and that is part of the time. CPU seconds, so that other work on the machine does not count.
"""
import argparse, itertools, statistics, tempfile, time
from pathlib import Path
import numpy as np, torch
from llmlab import config
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.packing.cache import build_cache
from llmlab.packing.loader import Loader

TOKENS = 16_384 # in a batch

def get_batch(raw, T):
    "nanoGPT's get_batch, tokens only."
    ix = torch.randint(len(raw)-T, (TOKENS//T,))
    return torch.stack([torch.from_numpy(raw[i:i+T].astype(np.int64)) for i in ix])

def get_batch_xy(path, T):
    "nanoGPT's get_batch as it is: the memmap opened anew (against a leak), tokens and targets."
    raw = np.memmap(path, np.uint16, 'r')
    ix = torch.randint(len(raw)-T, (TOKENS//T,))
    x = torch.stack([torch.from_numpy(raw[i:i+T].astype(np.int64)) for i in ix])
    return x, torch.stack([torch.from_numpy(raw[i+1:i+1+T].astype(np.int64)) for i in ix])

def gather(rows, order):
    "The best that a raw file can do: all rows of a batch in one numpy call, tokens only."
    return torch.from_numpy(rows[next(order)].astype(np.int64))

def shuffled(num_rows, B):
    while True:
        order = np.random.permutation(num_rows)
        yield from (order[i:i+B] for i in range(0, num_rows-B+1, B))

def readers(room, megabytes, T):
    "name -> (function that gives a batch, batches in an epoch)"
    corpus = open_corpus(config.Data(name='python', validation_fraction=0.))
    corpus = Head(corpus, megabytes*1_000_000)
    tokenizer = build_tokenizer(config.Tokenizer(vocab_size=8192, train_megabytes=5), corpus)
    caches = {c: build_cache(corpus, tokenizer, config.Packing(seq_len=T, chunk_rows=8192*512//T, codec=c, folder=str(room))) for c in ('lz4', 'none')}
    raw_file, rows = room/f'raw-{T}.bin', [caches['none'].chunk(i).tokens for i in range(len(caches['none'].chunks))]
    np.concatenate([r.reshape(-1) for r in rows]).tofile(raw_file)
    raw = np.memmap(raw_file, np.uint16, 'r')
    table, B, n = raw[:len(raw)//T*T].reshape(-1, T), TOKENS//T, caches['lz4'].num_rows//(TOKENS//T)
    order = shuffled(len(table), B)
    out = {'get_batch (nanoGPT), x': lambda: get_batch(raw, T), 'get_batch as shipped, x and y': lambda: get_batch_xy(raw_file, T),
        'raw memmap, one gather, x': lambda: gather(table, order)}
    for codec, cache in caches.items():
        loader = Loader(cache, B, seed=0, workers=0, window=max(1, len(cache.chunks)//2)) # two windows: every chunk is decoded in every epoch
        out[f'ours, {codec}, all of a batch'] = loader.__next__
    return caches, out, n

class Head:
    "The first bytes of a corpus."
    def __init__(self, corpus, size):
        self.corpus, self.size_bytes = corpus, size
        self.name, self.licence, self.fingerprint = corpus.name, corpus.licence, f'{corpus.fingerprint}-{size}'
    def iterate(self, split, start=0):
        left = self.size_bytes
        for d in self.corpus.iterate(split):
            if d.index >= start: yield d
            left -= len(d.text.encode())
            if left <= 0: return

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--megabytes', type=int, default=24, help='text to read')
    p.add_argument('--rounds', type=int, default=7, help='turns of each reader, an epoch each')
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room:
        for T in (512, 2048):
            caches, fs, n = readers(Path(room), args.megabytes, T)
            print(*caches.values(), sep='\n')
            rate = {name: [] for name in fs}
            for r, (name, f) in itertools.product(range(args.rounds+1), fs.items()):
                began = time.process_time()
                for _ in range(n): f()
                if r: rate[name].append(n*TOKENS/(time.process_time()-began)/1e6) # the first round warms up
            base = statistics.median(rate['get_batch (nanoGPT), x'])
            for name, r in rate.items(): print(f'T={T:5}  {name:32} {statistics.median(r):8.0f} M tokens/s   x {statistics.median(r)/base:5.2f}   (from {min(r):.0f} to {max(r):.0f})')

if __name__ == '__main__': main()
