"""Speed of the two BPE engines, one core, same vocabulary, same text, taking turns.

    python tests/bench/tokenizer.py [--vocab_size 8192] [--megabytes 6] [--rounds 5]

Both give the ids as uint16 arrays, document by document, on the sources of Python. CPU seconds, so that other work on the machine does not count.
"""
import argparse, os, statistics, time
os.environ['RAYON_NUM_THREADS'] = '1' # one core for `tokenizers`, read when it starts
from llmlab import config
from llmlab.data import tokenizer as page
from llmlab.data.corpora import open_corpus

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument('--vocab_size', type=int, default=8192)
options.add_argument('--megabytes', type=float, default=6)
options.add_argument('--rounds', type=int, default=5)
o = options.parse_args()

page._cores = lambda: 1
corpus = open_corpus(config.Data(name='python'))
engines = {e: page.train_tokenizer((d.text for d in corpus.iterate('train')), config.Tokenizer(vocab_size=o.vocab_size, train_megabytes=8, engine=e)) for e in ('tokenizers', 'tiktoken')}
texts, size = [], 0
for d, _ in corpus.all(1400): # beyond what the vocabulary was learned from
    if size > o.megabytes*1e6: break
    texts.append(d.text); size += d.num_bytes

rates, ids = {e: [] for e in engines}, {}
for _ in range(o.rounds):
    for name, t in engines.items():
        since = time.process_time()
        ids[name] = t.encode_batch(texts)
        rates[name].append(sum(map(len, ids[name]))/(time.process_time()-since)/1e6)
differ = sum(a.tolist() != b.tolist() for a, b in zip(*ids.values()))
print(f'{len(texts)} documents, {size/1e6:.1f} MB, {size/sum(map(len, ids["tiktoken"])):.2f} bytes a token; {differ} documents differ')
for name, r in rates.items(): print(f'{name:11} {statistics.median(r):5.2f} M tokens a CPU second ({min(r):.2f} to {max(r):.2f})')
print(f'ratio       {statistics.median(a/b for a, b in zip(rates["tiktoken"], rates["tokenizers"])):5.2f}')
