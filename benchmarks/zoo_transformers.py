"""Small configurations of transformers' models: width 32 to 64, 2 layers, 4 heads, random weights, nothing downloaded.

A row is (name, prefix of the classes, suffix of the model class, kind of input, changes to the kind's configuration);
a change to `...` leaves the setting out."""
import torch

LAYERS = dict(num_hidden_layers=2, num_attention_heads=4, initializer_range=.1)
TEXT = dict(LAYERS, vocab_size=99, hidden_size=32, intermediate_size=56, max_position_embeddings=64, use_cache=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)
GQA = dict(TEXT, num_key_value_heads=2)
BOTH = dict(vocab_size=99, d_model=32, hidden_size=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=56, decoder_ffn_dim=48, max_position_embeddings=64, init_std=.1,
            use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=2)
T5 = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_decoder_layers=2, num_heads=4, use_cache=False,
          pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
IMAGE = dict(LAYERS, hidden_size=32, intermediate_size=56, image_size=32, patch_size=8, num_labels=7)
AUDIO = dict(LAYERS, vocab_size=31, hidden_size=32, intermediate_size=56, conv_dim=(24, 24), conv_kernel=(10, 3), conv_stride=(5, 2),
             num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, mask_time_prob=0.,
             num_codevectors_per_group=8, pad_token_id=0, layerdrop=0., apply_spec_augment=False)
MOE = dict(GQA, num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
           shared_expert_intermediate_size=40, norm_topk_prob=True)
PYRAMID = dict(num_labels=7, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], initializer_range=.1)
TOWER = dict(LAYERS, hidden_size=32, intermediate_size=56, projection_dim=24)
PAIR = dict(text_config=dict(TEXT, projection_dim=24), vision_config=dict(TOWER, image_size=32, patch_size=8), projection_dim=24)


def ids(length=16, batch=2): return torch.randint(3, 99, (batch, length))
def image(size=32): return torch.randn(2, 3, size, size)
def mask(length=16): return (torch.arange(length) < torch.tensor([[length], [length - 3]])).long()


KINDS = {  # kind -> its configuration, its inputs
    'encoder': (TEXT, lambda: dict(input_ids=ids(), attention_mask=mask())), 'ids': (TEXT, lambda: dict(input_ids=ids())),
    'decoder': (TEXT, lambda: dict(input_ids=ids())), 'gqa': (GQA, lambda: dict(input_ids=ids())), 'moe': (MOE, lambda: dict(input_ids=ids())),
    'both': (BOTH, lambda: dict(input_ids=ids(), attention_mask=mask(), decoder_input_ids=ids(9))),
    't5': (T5, lambda: dict(input_ids=ids(), attention_mask=mask(), decoder_input_ids=ids(9))),
    'image': (IMAGE, lambda: dict(pixel_values=image())), 'image64': (dict(IMAGE, image_size=64), lambda: dict(pixel_values=image(64))),
    'plain': ({}, lambda: dict(pixel_values=image())), 'plain64': ({}, lambda: dict(pixel_values=image(64))),
    'pyramid': (PYRAMID, lambda: dict(pixel_values=image(64))),
    'video': (dict(IMAGE, num_frames=4), lambda: dict(pixel_values=torch.randn(2, 4, 3, 32, 32))),
    'mae': (IMAGE, lambda: dict(pixel_values=image(), noise=torch.rand(2, 16))),
    'audio': (AUDIO, lambda: dict(input_values=torch.randn(2, 800))),
    'spectrogram': (LAYERS, lambda: dict(input_values=torch.randn(2, 32, 16))),
    'features': (BOTH, lambda: dict(input_features=torch.randn(2, 40, 16), decoder_input_ids=ids(9))),
    'whisper': (BOTH, lambda: dict(input_features=torch.randn(2, 16, 40), decoder_input_ids=ids(9))),
    'frames': (LAYERS, lambda: dict(input_features=torch.randn(2, 40, 16))),
    'pair': (PAIR, lambda: dict(input_ids=ids(), attention_mask=mask(), pixel_values=image())),
    'pair_image': (PAIR, lambda: dict(pixel_values=image())),
    'boxes': (TEXT, lambda: dict(input_ids=ids(), bbox=torch.randint(0, 30, (2, 16, 4)).sort(-1).values, attention_mask=mask())),
    'chars': (TEXT, lambda: dict(input_ids=ids(64))), 'series': ({}, lambda: dict(past_values=torch.randn(2, 32, 3))),
}

DETR = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_queries=6, num_labels=5, d_model=32,
            encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=40, backbone_config=('ResNetConfig', dict(embedding_size=16, hidden_sizes=[16, 24, 32, 48],
            depths=[1, 1, 1, 1], out_features=['stage4'])))
SWIN = dict(image_size=32, patch_size=2, embed_dim=16, depths=[1, 2, 1], num_heads=[2, 2, 4], window_size=4, num_labels=7)
SSM = dict(state_size=8, num_hidden_layers=2, conv_kernel=4, expand=2)

MODELS = (  # encoders
    ('bert', 'Bert', 'ForSequenceClassification', 'encoder', {}),
    ('roberta', 'Roberta', 'ForMaskedLM', 'encoder', dict(max_position_embeddings=80)),
    ('xlm_roberta', 'XLMRoberta', 'ForTokenClassification', 'encoder', dict(max_position_embeddings=80)),
    ('albert', 'Albert', 'ForMaskedLM', 'encoder', dict(embedding_size=24)),
    ('electra', 'Electra', 'ForPreTraining', 'encoder', dict(embedding_size=24)),
    ('distilbert', 'DistilBert', 'ForSequenceClassification', 'encoder', dict(dim=32, n_layers=2, n_heads=4, hidden_dim=56)),
    ('deberta', 'Deberta', 'ForSequenceClassification', 'encoder', dict(relative_attention=True, max_relative_positions=16,
        pos_att_type=['c2p', 'p2c'], position_biased_input=False, type_vocab_size=0)),
    ('deberta_v2', 'DebertaV2', 'ForTokenClassification', 'encoder', dict(relative_attention=True, position_buckets=8,
        pos_att_type=['c2p', 'p2c'], share_att_key=True, norm_rel_ebd='layer_norm', conv_kernel_size=3, type_vocab_size=0)),
    ('mpnet', 'MPNet', 'ForMaskedLM', 'encoder', dict(max_position_embeddings=80)),
    ('xlnet', 'XLNet', 'ForSequenceClassification', 'encoder', dict(d_model=32, n_layer=2, n_head=4, d_inner=56, max_position_embeddings=...)),
    ('longformer', 'Longformer', 'ForMaskedLM', 'encoder', dict(attention_window=8, max_position_embeddings=80)),
    ('big_bird', 'BigBird', 'ForMaskedLM', 'encoder', dict(attention_type='original_full')),
    ('big_bird_sparse', 'BigBird', 'ForMaskedLM', 'chars', dict(block_size=4, num_random_blocks=1)),
    ('funnel', 'Funnel', 'ForMaskedLM', 'encoder', dict(d_model=32, block_sizes=[1, 1], n_head=4, d_head=8, d_inner=56, num_hidden_layers=...)),
    ('convbert', 'ConvBert', 'ForMaskedLM', 'encoder', dict(embedding_size=32, head_ratio=2)),
    ('squeezebert', 'SqueezeBert', 'ForSequenceClassification', 'encoder', dict(embedding_size=32)),
    ('mobilebert', 'MobileBert', 'ForMaskedLM', 'encoder', dict(hidden_size=64, embedding_size=32, intra_bottleneck_size=32,
        true_hidden_size=32, num_feedforward_networks=2)),
    ('layoutlm', 'LayoutLM', 'ForTokenClassification', 'boxes', dict(max_2d_position_embeddings=32)),
    ('lilt', 'Lilt', 'ForTokenClassification', 'boxes', dict(max_2d_position_embeddings=32, max_position_embeddings=80, channel_shrink_ratio=2, hidden_size=48)),
    ('fnet', 'FNet', 'ForSequenceClassification', 'ids', {}),
    ('nystromformer', 'Nystromformer', 'ForSequenceClassification', 'ids', dict(segment_means_seq_len=16, num_landmarks=4)),
    ('modernbert', 'ModernBert', 'ForMaskedLM', 'encoder', dict(local_attention=8, cls_token_id=3, sep_token_id=4)),
    ('roformer', 'RoFormer', 'ForMaskedLM', 'encoder', dict(embedding_size=32)),
    ('esm', 'Esm', 'ForMaskedLM', 'encoder', dict(position_embedding_type='rotary', mask_token_id=4, token_dropout=False)),
    ('rembert', 'RemBert', 'ForSequenceClassification', 'encoder', dict(input_embedding_size=24, output_embedding_size=40)),
    ('megatron_bert', 'MegatronBert', 'ForMaskedLM', 'encoder', {}), ('ibert', 'IBert', 'ForMaskedLM', 'encoder', dict(max_position_embeddings=80)),
    ('canine', 'Canine', 'ForSequenceClassification', 'chars', dict(local_transformer_stride=16, num_hash_buckets=80, downsampling_rate=4)),
    ('xlm', 'XLM', 'WithLMHeadModel', 'encoder', dict(n_words=99, emb_dim=32, n_layers=2, n_heads=4)),
    ('yoso', 'Yoso', 'ForSequenceClassification', 'encoder', dict(use_expectation=True)),
    ('luke', 'Luke', 'ForSequenceClassification', 'encoder', dict(entity_vocab_size=20, entity_emb_size=16, max_position_embeddings=80)),
    # decoders
    ('gpt2', 'GPT2', 'LMHeadModel', 'decoder', {}), ('gpt_bigcode', 'GPTBigCode', 'ForCausalLM', 'decoder', dict(n_inner=56)),
    ('gpt_neo', 'GPTNeo', 'ForCausalLM', 'decoder', dict(num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]], window_size=8)),
    ('gptj', 'GPTJ', 'ForCausalLM', 'decoder', dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
    ('gpt_neox', 'GPTNeoX', 'ForCausalLM', 'decoder', {}), ('openai_gpt', 'OpenAIGPT', 'LMHeadModel', 'decoder', dict(n_positions=64)),
    ('opt', 'OPT', 'ForCausalLM', 'decoder', dict(ffn_dim=56, word_embed_proj_dim=24)), ('bloom', 'Bloom', 'ForCausalLM', 'decoder', {}),
    ('llama', 'Llama', 'ForCausalLM', 'gqa', {}), ('mistral', 'Mistral', 'ForCausalLM', 'gqa', dict(sliding_window=8)),
    ('qwen2', 'Qwen2', 'ForCausalLM', 'gqa', {}), ('qwen3', 'Qwen3', 'ForCausalLM', 'gqa', dict(head_dim=12)),
    ('gemma', 'Gemma', 'ForCausalLM', 'gqa', dict(head_dim=12)), ('gemma2', 'Gemma2', 'ForCausalLM', 'gqa', dict(head_dim=12, sliding_window=8)),
    ('gemma3', 'Gemma3', 'ForCausalLM', 'gqa', dict(head_dim=12, sliding_window=8, config='Gemma3TextConfig')),
    ('phi', 'Phi', 'ForCausalLM', 'decoder', {}), ('phi3', 'Phi3', 'ForCausalLM', 'gqa', {}), ('falcon', 'Falcon', 'ForCausalLM', 'decoder', {}),
    ('falcon_new', 'Falcon', 'ForCausalLM', 'decoder', dict(new_decoder_architecture=True, num_kv_heads=2)),
    ('mpt', 'Mpt', 'ForCausalLM', 'decoder', dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64)),
    ('codegen', 'CodeGen', 'ForCausalLM', 'decoder', dict(rotary_dim=4)), ('stablelm', 'StableLm', 'ForCausalLM', 'gqa', {}),
    ('cohere', 'Cohere', 'ForCausalLM', 'gqa', dict(use_qk_norm=True)), ('olmo', 'Olmo', 'ForCausalLM', 'gqa', {}),
    ('olmo2', 'Olmo2', 'ForCausalLM', 'gqa', {}), ('granite', 'Granite', 'ForCausalLM', 'gqa', {}),
    ('starcoder2', 'Starcoder2', 'ForCausalLM', 'gqa', {}), ('persimmon', 'Persimmon', 'ForCausalLM', 'decoder', dict(qk_layernorm=True)),
    ('nemotron', 'Nemotron', 'ForCausalLM', 'gqa', {}), ('glm', 'Glm', 'ForCausalLM', 'gqa', dict(head_dim=8)),
    ('biogpt', 'BioGpt', 'ForCausalLM', 'decoder', {}), ('xglm', 'XGLM', 'ForCausalLM', 'decoder', dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=56)),
    ('ctrl', 'CTRL', 'LMHeadModel', 'decoder', dict(n_embd=32, n_layer=2, n_head=4, dff=56, n_positions=64)),
    ('mamba', 'Mamba', 'ForCausalLM', 'ids', dict(SSM, time_step_rank=4)), ('mamba2', 'Mamba2', 'ForCausalLM', 'ids', dict(SSM, num_heads=8, head_dim=8, n_groups=2, chunk_size=8)),
    ('recurrent_gemma', 'RecurrentGemma', 'ForCausalLM', 'gqa', dict(lru_width=32, num_hidden_layers=3, attention_window_size=8)),
    ('deepseek_v3', 'DeepseekV3', 'ForCausalLM', 'moe', dict(n_routed_experts=4, n_group=2, topk_group=1, n_shared_experts=1, q_lora_rank=16,
        kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8, first_k_dense_replace=1, num_key_value_heads=4)),
    # mixtures of experts
    ('mixtral', 'Mixtral', 'ForCausalLM', 'moe', {}), ('qwen2_moe', 'Qwen2Moe', 'ForCausalLM', 'moe', {}),
    ('qwen3_moe', 'Qwen3Moe', 'ForCausalLM', 'moe', dict(head_dim=12)), ('olmoe', 'Olmoe', 'ForCausalLM', 'moe', {}),
    ('granitemoe', 'GraniteMoe', 'ForCausalLM', 'moe', {}), ('phimoe', 'Phimoe', 'ForCausalLM', 'moe', {}),
    ('jamba', 'Jamba', 'ForCausalLM', 'moe', dict(use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4)),
    ('gpt_oss', 'GptOss', 'ForCausalLM', 'moe', dict(head_dim=8, sliding_window=8)),
    ('switch_transformers', 'SwitchTransformers', 'ForConditionalGeneration', 't5', dict(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=8)),
    # encoder-decoders
    ('t5', 'T5', 'ForConditionalGeneration', 't5', {}), ('mt5', 'MT5', 'ForConditionalGeneration', 't5', dict(feed_forward_proj='gated-gelu')),
    ('umt5', 'UMT5', 'ForConditionalGeneration', 't5', {}),
    ('longt5', 'LongT5', 'ForConditionalGeneration', 't5', dict(local_radius=3, global_block_size=4, encoder_attention_type='transient-global')),
    ('bart', 'Bart', 'ForConditionalGeneration', 'both', {}), ('mbart', 'MBart', 'ForConditionalGeneration', 'both', {}),
    ('pegasus', 'Pegasus', 'ForConditionalGeneration', 'both', {}), ('marian', 'Marian', 'MTModel', 'both', {}),
    ('blenderbot', 'Blenderbot', 'ForConditionalGeneration', 'both', {}), ('m2m_100', 'M2M100', 'ForConditionalGeneration', 'both', {}),
    ('led', 'LED', 'ForConditionalGeneration', 'both', dict(attention_window=8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)),
    ('prophetnet', 'ProphetNet', 'ForConditionalGeneration', 'both', dict(encoder_layers=..., decoder_layers=..., encoder_attention_heads=...,
        decoder_attention_heads=..., num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, ngram=2, num_buckets=8, relative_max_distance=16)),
    ('plbart', 'PLBart', 'ForConditionalGeneration', 'both', {}), ('bigbird_pegasus', 'BigBirdPegasus', 'ForConditionalGeneration', 'both', dict(attention_type='original_full')),
    # vision
    ('vit', 'ViT', 'ForImageClassification', 'image', {}), ('deit', 'DeiT', 'ForImageClassificationWithTeacher', 'image', {}),
    ('beit', 'Beit', 'ForImageClassification', 'image', dict(use_relative_position_bias=True)), ('dinov2', 'Dinov2', 'ForImageClassification', 'image', {}),
    ('dinov2_swiglu', 'Dinov2', 'ForImageClassification', 'image', dict(use_swiglu_ffn=True)), ('ijepa', 'IJepa', 'ForImageClassification', 'image', {}),
    ('swin', 'Swin', 'ForImageClassification', 'plain', SWIN), ('swinv2', 'Swinv2', 'ForImageClassification', 'plain', SWIN),
    ('focalnet', 'FocalNet', 'ForImageClassification', 'plain', dict(SWIN, focal_levels=[2, 2, 2], focal_windows=[3, 3, 3])),
    ('convnext', 'ConvNext', 'ForImageClassification', 'pyramid', {}), ('convnextv2', 'ConvNextV2', 'ForImageClassification', 'pyramid', {}),
    ('resnet', 'ResNet', 'ForImageClassification', 'pyramid', {}), ('regnet', 'RegNet', 'ForImageClassification', 'pyramid', dict(groups_width=8)),
    ('bit', 'Bit', 'ForImageClassification', 'pyramid', dict(num_groups=4, embedding_size=16)),
    ('segformer', 'Segformer', 'ForSemanticSegmentation', 'pyramid', dict(num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=40)),
    ('poolformer', 'PoolFormer', 'ForImageClassification', 'pyramid', {}), ('pvt', 'Pvt', 'ForImageClassification', 'pyramid', dict(image_size=64, num_attention_heads=[1, 2, 4, 4])),
    ('pvt_v2', 'PvtV2', 'ForImageClassification', 'pyramid', dict(image_size=64, num_attention_heads=[1, 2, 4, 4])),
    ('mobilevit', 'MobileViT', 'ForImageClassification', 'image64', dict(patch_size=2, hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 48])),
    ('mobilenet_v1', 'MobileNetV1', 'ForImageClassification', 'image64', dict(depth_multiplier=.25)),
    ('mobilenet_v2', 'MobileNetV2', 'ForImageClassification', 'image64', dict(depth_multiplier=.25)),
    ('efficientnet', 'EfficientNet', 'ForImageClassification', 'image64', dict(hidden_dim=640, width_coefficient=.5, depth_coefficient=.5)),
    ('levit', 'Levit', 'ForImageClassification', 'image64', dict(hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8],
        patch_size=16, kernel_size=3, stride=2, padding=1, attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2])),
    ('cvt', 'Cvt', 'ForImageClassification', 'plain64', dict(embed_dim=[16, 24, 32], num_heads=[1, 2, 4], depth=[1, 2, 3])),
    ('vit_mae', 'ViTMAE', 'ForPreTraining', 'mae', dict(decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=40)),
    ('videomae', 'VideoMAE', 'ForVideoClassification', 'video', {}), ('timesformer', 'Timesformer', 'ForVideoClassification', 'video', {}),
    ('dpt', 'DPT', 'ForSemanticSegmentation', 'image64', dict(backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 24, 24], fusion_hidden_size=16, num_hidden_layers=4)),
    ('yolos', 'Yolos', 'ForObjectDetection', 'image64', dict(image_size=[64, 64], num_detection_tokens=6)),
    ('detr', 'Detr', 'ForObjectDetection', 'pyramid', DETR),
    ('conditional_detr', 'ConditionalDetr', 'ForObjectDetection', 'pyramid', DETR),
    ('glpn', 'GLPN', 'ForDepthEstimation', 'pyramid', dict(num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=32)),
    # audio
    ('wav2vec2', 'Wav2Vec2', 'ForCTC', 'audio', {}), ('wav2vec2_stable', 'Wav2Vec2', 'ForCTC', 'audio', dict(do_stable_layer_norm=True, feat_extract_norm='layer', conv_bias=True)),
    ('hubert', 'Hubert', 'ForCTC', 'audio', {}), ('wavlm', 'WavLM', 'ForCTC', 'audio', dict(num_buckets=16, max_bucket_distance=20)),
    ('unispeech', 'UniSpeech', 'ForCTC', 'audio', {}), ('unispeech_sat', 'UniSpeechSat', 'ForCTC', 'audio', {}),
    ('sew', 'SEW', 'ForCTC', 'audio', dict(squeeze_factor=2)), ('sew_d', 'SEWD', 'ForCTC', 'audio', dict(squeeze_factor=2, position_buckets=8, max_position_embeddings=64)),
    ('data2vec_audio', 'Data2VecAudio', 'ForCTC', 'audio', dict(num_conv_pos_embeddings=2, conv_pos_kernel_size=5)),
    ('wav2vec2_conformer', 'Wav2Vec2Conformer', 'ForCTC', 'audio', dict(position_embeddings_type='relative')),
    ('wav2vec2_bert', 'Wav2Vec2Bert', 'ForCTC', 'frames', dict(vocab_size=31, hidden_size=32, intermediate_size=56, feature_projection_input_dim=16, mask_time_prob=0., pad_token_id=0)),
    ('whisper', 'Whisper', 'ForConditionalGeneration', 'whisper', dict(num_mel_bins=16, max_source_positions=20, max_target_positions=32)),
    ('speech_to_text', 'Speech2Text', 'ForConditionalGeneration', 'features', dict(input_feat_per_channel=16, conv_channels=24, max_source_positions=40, max_target_positions=32)),
    ('ast', 'AST', 'ForAudioClassification', 'spectrogram', dict(hidden_size=32, intermediate_size=56, patch_size=8, max_length=32, num_mel_bins=16, frequency_stride=8, time_stride=8)),
    # two towers, series
    ('clip', 'CLIP', 'Model', 'pair', {}), ('siglip', 'Siglip', 'Model', 'pair', {}), ('chinese_clip', 'ChineseCLIP', 'Model', 'pair', {}), ('altclip', 'AltCLIP', 'Model', 'pair', {}),
    ('clip_vision', 'CLIP', 'ForImageClassification', 'pair_image', {}),
    ('patchtst', 'PatchTST', 'ForPrediction', 'series', dict(num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=32, ffn_dim=56, num_attention_heads=4,
        num_hidden_layers=2, prediction_length=4)),
)


def build(prefix, suffix, kind, changes):
    import transformers
    config, inputs = KINDS[kind]
    changes = {k: getattr(transformers, v[0])(**v[1]) if k == 'backbone_config' else v for k, v in changes.items()}
    config_class = getattr(transformers, changes.pop('config', f'{prefix}Config'))
    settings = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    return getattr(transformers, prefix + suffix)(config_class(**settings)), inputs()


def models():
    "name -> factory"
    return {name: lambda args=args: build(*args) for name, *args in MODELS}
