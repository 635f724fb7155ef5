"""Reads corpora for test_hub.py in a process of its own, since the hub libraries read their environment when they are imported.
A line of JSON comes in, {"data": settings, "start": .., "stop": .., "take": .., "last": ..}; a line goes out: the texts or the error, what was said, how long it would have waited."""
import collections, itertools, json, resource, sys, time

time.sleep = lambda seconds: None # nobody waits here
from llmlab import config
from llmlab.data import hub
from llmlab.data.corpora import open_corpus
from llmlab.files import DataError

waits, true_backoff = [], hub.backoff
def backoff(failed, asked=0.):
    waits.append([failed, asked, true_backoff(failed, asked)])
    return 0
hub.backoff = backoff


def answer(data, start=0, stop=None, take=None, hold=False, last=None):
    said, out = [], {}
    corpus = open_corpus(config.Data(**data), say=said.append)
    waits.clear()
    documents = corpus.all(start, stop)
    try:
        out['texts'] = list(collections.deque((d.text for d, _ in itertools.islice(documents, take)), last))
        out |= dict(fingerprint=corpus.fingerprint, size=corpus.size_bytes)
    except DataError as e: out['error'] = str(e)
    if hold: kept.append(documents)
    else: documents.close()
    return out | dict(said=said, waits=list(waits), peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)


kept = [] # readers that are not done
if __name__ == '__main__':
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
    for reader in kept: reader.close()
