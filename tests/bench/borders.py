"""How long a batch makes a training loop wait at the border of two windows of the loader, with the next window decoded ahead and without.

    python tests/bench/borders.py [--step 0.001] [--windows 3]

Windows of 2^27 tokens, as in training: the chunk of a small cache stands in for all of them (its file is read, checked and decoded anew each time). The
loop takes a batch of 16,384 tokens and then waits as long as a step takes on a GPU, with the processor idle. Longest waits are of the wall: run it alone.
"""
import argparse, tempfile, time
import numpy as np, torch
from llmlab import config
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.packing.cache import build_cache
from llmlab.packing.loader import WINDOW_TOKENS, Loader

class Again:
    "A cache that has one chunk many times."
    def __init__(self, cache, times):
        self.cache, self.meta, self.seq_len, self.path = cache, cache.meta, cache.seq_len, cache.path
        rows = int(cache.offsets[1])
        self.offsets, self.num_rows = np.arange(times+1)*rows, times*rows
    def chunk(self, i, into=None): return self.cache.chunk(0, into)
    def info(self): return self.cache.info()

def waits(loader, batches, step):
    "Seconds that each batch was waited for."
    out = []
    for _ in range(batches):
        began = time.perf_counter()
        next(loader)
        out.append(time.perf_counter()-began)
        time.sleep(step)
    return np.array(out)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--step', type=float, default=.001, help='seconds of a step')
    p.add_argument('--windows', type=int, default=3, help='windows to read')
    p.add_argument('--seq-len', type=int, default=512)
    args = p.parse_args()
    torch.set_num_threads(1)
    T, B = args.seq_len, 16_384//args.seq_len
    with tempfile.TemporaryDirectory() as room:
        corpus = open_corpus(config.Data(name='python', validation_fraction=0.))
        tokenizer = build_tokenizer(config.Tokenizer(vocab_size=8192, train_megabytes=5), corpus)
        small = build_cache(corpus, tokenizer, config.Packing(seq_len=T, chunk_rows=8192*512//T, folder=room))
        window = WINDOW_TOKENS//(8192*512)
        cache = Again(small, args.windows*window)
        began = time.process_time()
        for _ in range(4): small.chunk(0)
        print(f'{small.offsets[1]:,} rows of {T} in a chunk, {window} chunks in a window; decoding one takes {(time.process_time()-began)*window/4:.2f} s of CPU time')
        batches = args.windows*window*int(small.offsets[1])//B
        for name, ahead in (('the next window ahead', True), ('without', False)):
            loader = Loader(cache, B, seed=1, window=window)
            loader._reader.ahead = ahead
            next(loader)
            w = waits(loader, batches-10, args.step)[10:]*1000 # the very first window is always waited for
            loader.close()
            print(f'{name:22} longest waits for a batch {", ".join(f"{x:.1f}" for x in np.sort(w)[:-5:-1])} ms; median {np.median(w):.3f} ms, 99.9 % below {np.quantile(w, .999):.2f} ms')

if __name__ == '__main__': main()
