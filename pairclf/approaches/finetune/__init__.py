"""The approach `finetune`: a language model with a classification head, trained whole or through LoRA adapters."""
