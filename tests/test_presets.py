"Every preset is loaded, and its model built without weights."
import pytest
from llmlab.config import find_config, load_config, presets
from llmlab.models.transformer import count_parameters
from llmlab.models.zoo import SIZES, build_model

documented = {'small': (25e6, .1), 'medium': (50e6, .05), 'large': (125e6, .05), 'xl': (300e6, .05), '415m': (415e6, .03)} # parameters, tolerance


@pytest.mark.parametrize('name', presets())
def test_preset(name):
    cfg = load_config(name)
    vocab_size = cfg.tokenizer.vocab_size if cfg.tokenizer.kind == 'bpe' else 262
    network, _ = build_model(cfg, vocab_size, device='meta')
    assert all(p.is_meta for p in network.parameters())
    assert sum(p.numel() for p in network.parameters()) == count_parameters(network.shape)
    if name in documented:
        size, tolerance = documented[name]
        assert abs(count_parameters(network.shape)/size-1) <= tolerance, f'{count_parameters(network.shape):,}'


@pytest.mark.parametrize('name', presets())
def test_preset_survives_saving(name, tmp_path):
    cfg = load_config(name)
    assert load_config(cfg.save(tmp_path/'config.yaml')) == cfg
    assert find_config(name).read_text().startswith('#'), 'a preset says in its first line what it is for'


def test_sizes_are_those_of_the_config():
    from typing import get_args
    from llmlab.config import Model
    assert set(get_args(Model.model_fields['size'].annotation)) == set(SIZES)
