"""Fine-tuning on a file of instructions, measured on its last fifth: what is learned, beside the model before. Half an hour of CPU time for all arms.

    llmlab_train --config quickstart run.name=base
    python tests/bench/finetune.py --data alpaca_1k.json --base base --folder bench/ [--arms ours-full ours-lora llama-full llama-lora]
    python tests/bench/finetune.py --folder bench/ --table

ours: the quickstart model, trained on the text of Python. llama: a LlamaForCausalLM of transformers with random weights and a BPE of 4,096 trained on the training rows,
saved to bench/llama. Rows of 768 tokens, 800 rows to learn from and 200 held out, three epochs of Muon (full) or four of AdamW (LoRA, r=16); the network of noise takes six, and with LoRA its embeddings and head learn too; the checkpoint
with the lowest validation loss. Reported, with 95 % intervals by paired bootstrap over rows: loss of the answers (nats a token), instruction gain, ranking of 8, answers well formed.
"""
import argparse, json, subprocess, sys
from pathlib import Path

COMMON = ['packing.seq_len=768', 'finetune.split=tail', 'data.validation_fraction=0.2', 'tracking.wandb=off', 'trainer.batch_size=4', 'trainer.eval_interval=20', 'trainer.sample_tokens=0']
FULL = ['optim.name=muon', 'optim.lr=4e-3', 'optim.warmup_steps=20', 'trainer.epochs=3']
LORA = ['finetune.peft.method=lora', 'optim.lr=3e-3', 'optim.warmup_steps=20', 'trainer.epochs=4']
LONG = ['trainer.epochs=6', 'finetune.peft.train=[embed_tokens,lm_head]'] # between tables of noise no adapter learns anything
ARMS = {'ours-full': ('ours', FULL), 'ours-lora': ('ours', LORA), 'llama-full': ('llama', [*FULL, 'trainer.epochs=6']), 'llama-lora': ('llama', [*LORA, *LONG])}

def llama(folder:Path, data:Path)->None:
    "A Llama of random weights, with a tokenizer, as transformers saves them."
    import torch, transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    rows = json.loads(data.read_text())
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.train_from_iterator((' '.join((r['instruction'], r.get('input', ''), r['output'])) for r in rows[:len(rows)*4//5]), trainers.BpeTrainer(vocab_size=4096, special_tokens=['<pad>', '<s>', '</s>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=hf, pad_token='<pad>', bos_token='<s>', eos_token='</s>')
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(fast), hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(folder); fast.save_pretrained(folder)

def door(name:str, *words:str)->str: # what it printed
    print('llmlab_'+name, *words, flush=True)
    return subprocess.run([sys.executable, '-c', f'from llmlab.cli import {dict(eval="evaluate").get(name, name)} as d; d()', *words], check=True, stdout=subprocess.PIPE, text=True).stdout

def table(found:dict[str, dict])->str: # Markdown
    lines = ['| arm | loss of the answers | before | instruction gain | ranking of 8 (chance .125) | well formed | before |', '|---|---|---:|---|---|---|---:|']
    def cell(r:dict, key:str, digits:int)->str: return '{:.{n}f} [{:.{n}f}, {:.{n}f}]'.format(r[key], *r['intervals'][key], n=digits)
    for arm, r in found.items():
        lines.append(f'| {arm} | {cell(r, "instruct/nll", 2)} | {r["base"]["instruct/nll"]:.2f} | {cell(r, "instruct/gain", 3)} | {cell(r, "instruct/rank_accuracy", 3)} | {cell(r, "instruct/format_ok", 2)} | {r["base"]["instruct/format_ok"]:.2f} |')
    return '\n'.join(lines)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path); p.add_argument('--base'); p.add_argument('--folder', type=Path, required=True); p.add_argument('--arms', nargs='+', default=list(ARMS)); p.add_argument('--table', action='store_true')
    a = p.parse_args()
    for arm in () if a.table else a.arms:
        what, words = ARMS[arm]
        if (a.folder/f'{arm}.json').exists(): continue
        if what == 'llama' and not (a.folder/'llama').exists(): llama(a.folder/'llama', a.data)
        init = a.base if what == 'ours' else str(a.folder/'llama')
        if not Path('runs', f'bench-{arm}').exists(): door('finetune', f'finetune.init={init}', f'data.path={a.data.resolve()}', f'run.name=bench-{arm}', f'finetune.folder={a.folder}/data', *COMMON, *words)
        found = json.loads(door('eval', f'bench-{arm}', '--best', '--metrics', 'instruct', '--max-new-tokens', '64'))
        (a.folder/f'{arm}.json').write_text(json.dumps(found))
    print(table({arm: json.loads((a.folder/f'{arm}.json').read_text()) for arm in ARMS if (a.folder/f'{arm}.json').exists()}))
