"""Checkpoints of every architecture of the registry with random weights and a few hundred thousand parameters
written to disk as the hub lays them out (config, processor, tokenizer,
                                          safetensors shards), so that the loader of
the real ones loads them."""

from pathlib import Path
from fada.registry import MODELS

CORPUS = [
    'Question: Which standard plane is it? Answer: transverse abdominal plane.',
    'good image quality, normal, femur head heart',
    'user assistant What structures are seen? Answer in a few words.',
    'axial sagittal coronal spine left right 12 34 56 78 90',
]
LLAMA = dict(
    model_type='llama',
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.1,
    max_position_embeddings=1024,
)
T5 = dict(
    model_type='t5',
    tie_word_embeddings=False,
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    feed_forward_proj='gated-gelu',
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
    initializer_factor=1.0,
)
GEMMA3 = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=64,
    layer_types=['sliding_attention', 'full_attention'],
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    query_pre_attn_scalar=16,
    initializer_range=0.1,
    max_position_embeddings=1024,
)
OPT = dict(
    model_type='opt',
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=128,
    word_embed_proj_dim=64,
    init_std=0.1,
    max_position_embeddings=256,
    dropout=0.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ROPE = dict(rope_type='default', rope_theta=1e6, mrope_section=[2, 3, 3])
VIT = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
)
SIGLIP = dict(VIT, model_type='siglip_vision_model', vision_use_head=False)


def chat_template(start, end, image, turn='{role}\n', bos='', assistant='assistant'):
    "A chat template in the manner of the published ones: turns between markers, an image as its token"
    image = f"{{% if p['type'] == 'image' %}}{image}{{% else %}}{{{{ p['text'] }}}}{{% endif %}}"
    many = f"{{% for p in c %}}{image}{{% endfor %}}"
    said = f"{{% if c is string %}}{{{{ c }}}}{{% else %}}{many}{{% endif %}}"
    role = f"{{{{ '{assistant}' if m['role'] == 'assistant' else m['role'] }}}}"
    said = f"{start}{turn.replace('{role}', role)}{said}{end}\n"
    body = f"{{% for m in messages %}}{{% set c = m['content'] %}}{said}{{% endfor %}}"
    ask = f"{{% if add_generation_prompt %}}{start}{turn.replace('{role}', assistant)}{{% endif %}}"
    return bos + body + ask


def tokenizer(extra=(), named=None, bos='<s>', eos='</s>', add_bos=False, add_eos=False, template=None):
    "A byte-level BPE tokenizer of about 400 tokens with the special tokens of an architecture"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.BPE(unk_token='<unk>'))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=['<pad>', bos, eos, '<unk>', *extra],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if add_bos or add_eos:
        single = (f'{bos} ' if add_bos else '') + '$A' + (f' {eos}' if add_eos else '')
        t.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(bos, 1), (eos, 2)])
    out = PreTrainedTokenizerFast(
        tokenizer_object=t,
        bos_token=bos,
        eos_token=eos,
        pad_token='<pad>',
        unk_token='<unk>',
        padding_side='left',
        **(dict(extra_special_tokens=named) if named else {}),
    )
    out.chat_template = template
    return out


def blip2(language, instruct=False):
    "(model, processor) of BLIP-2 or InstructBLIP with language model `language`"
    import torch
    import transformers
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    t5 = language.get('model_type') == 't5'
    tok = tokenizer(['<image>'], add_bos=not t5, add_eos=t5)
    n = len(tok)
    kind = 'InstructBlip' if instruct else 'Blip2'
    config, model, processor = (
        getattr(transformers, kind + k) for k in ('Config', 'ForConditionalGeneration', 'Processor')
    )
    m = model(
        config(
            vision_config=dict(VIT, initializer_range=0.1),
            text_config=dict(language, vocab_size=n),
            num_query_tokens=4,
            image_token_index=4,
            qformer_config=dict(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                encoder_hidden_size=64,
                cross_attention_frequency=1,
                vocab_size=n,
                initializer_range=0.1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
        )
    )
    with torch.no_grad():
        m.query_tokens.normal_(0, 0.5)
    if t5:  # Flan-T5's output head is not its embedding
        m.language_model.lm_head.weight = torch.nn.Parameter(m.language_model.shared.weight.detach().flip(0) * 0.3)
    ip = BlipImageProcessorPil(size=dict(height=56, width=56))
    return m, processor(ip, tok, *([tokenizer()] if instruct else []), num_query_tokens=4)


def llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tok = tokenizer(
        ['<image>'],
        add_bos=True,
        template=chat_template('', ' ', '<image>\n', turn='{role}: ', assistant='ASSISTANT'),
    )
    n = len(tok)
    m = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=dict(VIT, model_type='clip_vision_model', num_hidden_layers=3),
            text_config=dict(LLAMA, vocab_size=n),
            image_token_index=4,
            image_seq_length=16,
        )
    )
    ip = CLIPImageProcessorPil(size=dict(shortest_edge=56), crop_size=dict(height=56, width=56))
    return m, LlavaProcessor(
        ip,
        tok,
        patch_size=14,
        vision_feature_select_strategy='default',
        num_additional_image_tokens=1,
        chat_template=tok.chat_template,
    )


def gemma3():
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tok = tokenizer(
        ['<start_of_image>', '<image_soft_token>', '<end_of_image>', '<start_of_turn>', '<end_of_turn>'],
        bos='<bos>',
        eos='<eos>',
        named=dict(boi_token='<start_of_image>', image_token='<image_soft_token>', eoi_token='<end_of_image>'),
        add_bos=True,
        template=chat_template(
            '<start_of_turn>', '<end_of_turn>', '<start_of_image>', bos='{{ bos_token }}', assistant='model'
        ),
    )
    m = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=dict(GEMMA3, vocab_size=len(tok)),
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            boi_token_index=4,
            image_token_index=5,
            eoi_token_index=6,
        )
    )
    projector = m.model.multi_modal_projector
    with torch.no_grad():
        projector.mm_input_projection_weight.normal_(0, 0.2)  # zeros otherwise
    m.generation_config.eos_token_id = [2, 8]
    return m, Gemma3Processor(
        Gemma3ImageProcessorPil(size=dict(height=56, width=56)),
        tok,
        image_seq_length=4,
        chat_template=tok.chat_template,
    )


def qwen(series):
    "(model, processor) of Qwen2.5-VL or Qwen3-VL"
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from fada.checkpoints import _image_only

    new = series == 3
    kind = 'Qwen3VL' if new else 'Qwen2_5_VL'
    patch = 16 if new else 14
    tok = tokenizer(
        ['<|image_pad|>', '<|video_pad|>', '<|vision_start|>', '<|vision_end|>', '<|im_start|>'],
        bos='<|endoftext|>',
        eos='<|im_end|>',
        template=chat_template('<|im_start|>', '<|im_end|>', '<|vision_start|><|image_pad|><|vision_end|>'),
    )
    vision = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        out_hidden_size=64,
        patch_size=patch,
        initializer_range=0.1,
    )
    vision |= (
        dict(deepstack_visual_indexes=[0], num_position_embeddings=64)
        if new
        else dict(fullatt_block_indexes=[1], window_size=56)
    )
    text = dict(LLAMA, vocab_size=len(tok), rope_parameters=dict(ROPE, mrope_interleaved=True) if new else ROPE)
    text.pop('model_type')
    if new:
        text['head_dim'] = 16
    m = getattr(transformers, kind + 'ForConditionalGeneration')(
        getattr(transformers, kind + 'Config')(
            text_config=text,
            vision_config=vision,
            image_token_id=4,
            video_token_id=5,
            vision_start_token_id=6,
            vision_end_token_id=7,
        )
    )
    ip = Qwen2VLImageProcessorPil(min_pixels=(2 * patch) ** 2, max_pixels=(4 * patch) ** 2, patch_size=patch)
    return m, _image_only(getattr(transformers, kind + 'Processor'))(ip, tok, chat_template=tok.chat_template)


def internvl():
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from fada.checkpoints import _image_only

    tok = tokenizer(
        ['<img>', '</img>', '<IMG_CONTEXT>', '<video>', '<|im_start|>'],
        eos='<|im_end|>',
        named=dict(
            start_image_token='<img>',
            end_image_token='</img>',
            context_image_token='<IMG_CONTEXT>',
            video_token='<video>',
        ),
        template=chat_template('<|im_start|>', '<|im_end|>', '<IMG_CONTEXT>\n'),
    )
    m = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=dict(VIT, image_size=[56, 56], patch_size=[14, 14]),
            text_config=dict(LLAMA, model_type='qwen3', head_dim=16, vocab_size=len(tok)),
            image_token_id=6,
            image_seq_length=4,
        )
    )
    ip = GotOcr2ImageProcessorPil(size=dict(height=56, width=56), crop_to_patches=True)
    return m, _image_only(InternVLProcessor)(ip, tok, image_seq_length=4, chat_template=tok.chat_template)


def smolvlm():
    from transformers import Idefics3Processor, SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tok = tokenizer(
        ['<image>', '<fake_token_around_image>', '<global-img>', '<end_of_utterance>']
        + [f'<row_{i}_col_{j}>' for i in range(1, 7) for j in range(1, 7)],
        template=chat_template('', '<end_of_utterance>', '<image>', turn='{role}:'),
    )
    ip = SmolVLMImageProcessorPil(
        size=dict(longest_edge=56), max_image_size=dict(longest_edge=56), do_image_splitting=True
    )
    processor = Idefics3Processor(ip, tok, image_seq_len=4, chat_template=tok.chat_template)
    m = SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config=VIT,
            text_config=dict(LLAMA, vocab_size=len(tok)),
            image_token_id=4,
            scale_factor=2,
            pad_token_id=0,
        )
    )
    m.generation_config.eos_token_id = [2, 7]
    return m, processor


def paligemma():
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tok = tokenizer(['<image>'], named=dict(image_token='<image>'), bos='<bos>', eos='<eos>')
    ip = SiglipImageProcessorPil(size=dict(height=56, width=56))
    ip.image_seq_length = 16
    processor = PaliGemmaProcessor(ip, tok)
    text = {k: v for k, v in GEMMA3.items() if k != 'layer_types'}
    m = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            text_config=dict(text, model_type='gemma2', vocab_size=len(tok)),
            vision_config=dict(SIGLIP, projection_dim=64),
            projection_dim=64,
            image_token_index=4,
        )
    )
    return m, processor


def florence2():
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tok = tokenizer(['<image>'], named=dict(image_token='<image>'))
    vision = dict(
        depths=[1, 1, 2, 1],
        embed_dim=[64, 64, 64, 64],
        num_heads=[4, 4, 4, 4],
        num_groups=[4, 4, 4, 4],
        window_size=4,
        projection_dim=64,
        max_temporal_embeddings=10,
        max_position_embeddings=20,
        patch_size=[7, 3, 3, 3],
        drop_path_rate=0.0,
    )
    text = dict(
        model_type='bart',
        vocab_size=len(tok),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        is_encoder_decoder=True,
        init_std=0.1,
    )
    ip = CLIPImageProcessorPil(size=dict(height=64, width=64), do_center_crop=False, image_seq_length=5)
    reads = dict.fromkeys(
        (
            'pure_text',
            'description_with_bboxes',
            'bboxes',
            'phrase_grounding',
            'ocr',
            'polygons',
            'description_with_bboxes_or_polygons',
        ),
        {},
    )  # as the published checkpoints name them
    m = Florence2ForConditionalGeneration(Florence2Config(vision_config=vision, text_config=text, image_token_id=4))
    return m, Florence2Processor(ip, tok, post_processor_config=reads)


BUILD = {
    'blip2-opt': lambda: blip2(OPT),
    'blip2-t5': lambda: blip2(T5),
    'blip2-llama': lambda: blip2(LLAMA),
    'blip2-gemma3': lambda: blip2(dict(GEMMA3, model_type='gemma3_text')),
    'instructblip-t5': lambda: blip2(T5, True),
    'instructblip-llama': lambda: blip2(LLAMA, True),
    'llava': llava,
    'gemma3': gemma3,
    'gemma3-text': gemma3,
    'qwen2.5-vl': lambda: qwen(2.5),
    'qwen3-vl': lambda: qwen(3),
    'internvl': internvl,
    'smolvlm': smolvlm,
    'paligemma': paligemma,
    'florence2': florence2,
}


def row(architecture):
    "The registry row that stands for an architecture: the first that is not embedded"
    return next(m for m in MODELS.values() if m.architecture == architecture and not m.embedded)


def tiny(architecture, folder, seed=0):
    """(registry name, no adapter, folder) of a random checkpoint, as `fada.vlm.load` takes them; written
    once a folder"""
    import torch
    from fada.checkpoints import _quiet

    _quiet()
    out = Path(folder) / f'{architecture}-{seed}'
    if not (out / 'config.json').exists():
        torch.manual_seed(seed)
        model, processor = BUILD[architecture]()
        model.save_pretrained(out, max_shard_size='200KB')
        processor.save_pretrained(out)
    return row(architecture).name, None, out
