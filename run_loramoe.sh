#!/usr/bin/env bash
# Train a mixture of LoRA experts. Every value below can be overridden from the environment, and further flags of
# train.py can be added:   lora_rank=8 exp_name=rank8 bash run_loramoe.sh --weight_decay 0.01
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# A relative path is resolved against the caller's folder ($OLDPWD), or against this repository if only that has it.
if [[ $OLDPWD != "$PWD" ]]; then
    for name in pretrained_model tokenizer_path peft_path dataset_dir validation_file knowledge_probe \
        deepspeed_config_file output_dir; do
        value=${!name:-}
        if [[ -n $value && $value != /* ]] && [[ -e $OLDPWD/$value || ($name == output_dir && ! -e $value) ]]; then
            printf -v "$name" %s "$OLDPWD/$value"
        elif [[ $name =~ ^(peft_path|dataset_dir|validation_file)$ && -n $value && $value != auto && ! -e $value ]]; then
            echo "error: $name is '$value': there is no such file or folder in $OLDPWD or in $PWD" >&2
            exit 1
        fi
    done
fi

# ---- model -----------------------------------------------------------------------------------------------------------
pretrained_model=${pretrained_model:-models/SmolLM2-135M-Instruct}  # base model: local folder or hub id
tokenizer_path=${tokenizer_path:-}                  # tokenizer, where it is not the base model's
peft_path=${peft_path:-}                            # adapter folder to continue from; empty starts a fresh adapter
load_in_kbits=${load_in_kbits:-16}                  # bits per base weight: 4 (nf4), 8 (int8), 16 (as stored)

# ---- data ------------------------------------------------------------------------------------------------------------
dataset_dir=${dataset_dir:-data/tiny_data/train}    # training rows: a file, a folder, or a mix.yaml (docs/DATA.md)
validation_file=${validation_file-auto}             # held-out rows; empty: none; auto: the tiny data's or a mix's
max_seq_length=${max_seq_length:-1024}              # tokens; longer rows are cut at the end
packing=${packing:-false}                           # fill rows with several samples, which do not see each other
prompt_template=${prompt_template:-auto}            # plain, chat, or auto (chat where the tokenizer has a template)
knowledge_probe=${knowledge_probe:-auto}            # facts to ask: auto (data/world_facts), none, or a file of rows

# ---- method (the paper's settings) -----------------------------------------------------------------------------------
tuning=${tuning:-loramoe}                           # loramoe, or full (all weights: the paper's main baseline)
lora_nums=${lora_nums:-6}                           # experts per adapted Linear; 1 is plain LoRA
lora_rank=${lora_rank:-4}                           # rank of each expert
lora_alpha=${lora_alpha:-32}                        # the experts' output is scaled by lora_alpha / lora_rank
lora_dropout=${lora_dropout:-0.05}                  # probability of dropping an input element of the experts
lora_trainable=${lora_trainable:-auto}              # Linears to adapt: names, all-linear, a pattern, or auto
blc_alpha=${blc_alpha:-0.1}                         # delta: how far a group of experts is drawn to its task type
blc_weight=${blc_weight:-0.1}                       # beta: weight of the balance term in the loss; 0 turns it off
kl_weight=${kl_weight:-0}                           # of nearness to the base model on type 1 rows; try 30 with lr=1e-3

# ---- optimisation ----------------------------------------------------------------------------------------------------
lr=${lr:-2e-4}                                      # peak learning rate, cosine decay after 3 % of warm-up
num_train_epochs=${num_train_epochs:-2}             # passes over the training rows
max_steps=${max_steps:--1}                          # optimizer steps; above 0 it overrides num_train_epochs
seed=${seed:-41}                                    # of initialisation, data order and dropout
per_device_train_batch_size=${per_device_train_batch_size:-8}  # rows per process and micro-batch
per_device_eval_batch_size=${per_device_eval_batch_size:-8}    # rows per process in evaluation
gradient_accumulation_steps=${gradient_accumulation_steps:-1}  # micro-batches per optimizer step
gradient_checkpointing=${gradient_checkpointing:-false}        # recompute activations: less memory, 1.5 times the time

# ---- output ----------------------------------------------------------------------------------------------------------
output_dir=${output_dir:-outputs}                   # folder of all runs
exp_name=${exp_name:-default}                       # this run's folder in it; an unfinished run there is resumed
save_steps=${save_steps:-50}                        # optimizer steps between checkpoints
eval_steps=${eval_steps:-50}                        # optimizer steps between evaluations

# ---- launch ----------------------------------------------------------------------------------------------------------
num_processes=${num_processes:-}                    # processes on this node; empty: one per visible GPU, or one on a CPU
deepspeed_config_file=${deepspeed_config_file-auto} # JSON in scripts/deepspeed; auto: zero2.json on GPUs; empty: none
nnodes=${nnodes:-1}                                 # number of nodes; start this script on each
node_rank=${node_rank:-0}                           # this node's number, 0 to nnodes - 1
master_addr=${master_addr:-127.0.0.1}               # address of node 0
master_port=${master_port:-}                        # free port on node 0; empty: any on one node, 29500 on several

# ======================================================================================================================
for flag in "$@"; do
    if [[ $flag == -h || $flag == --help ]]; then # what stands above, as name=default
        sed -n '1d; /^# ===/q; /^set /d; /^cd /,/^$/d
            s/^\([a-z_]*\)=\${\1:\{0,1\}-\(.*\)} *# /\1=\2\t/; s/^# //; p' run_loramoe.sh | expand -t 48
        echo "The flags of train.py: python train.py --help"
        exit
    fi
done

# As a shell completes the name of a folder.
pretrained_model=${pretrained_model%/} dataset_dir=${dataset_dir%/}

if [[ $validation_file == auto ]]; then
    validation_file=""
    if [[ $dataset_dir == data/tiny_data/train ]]; then validation_file=data/tiny_data/test.json; fi
    holds_out='^[^#]*held_out["'\'']? *: *[0-9.]*[1-9]' # in a mix.yaml: a share that is not 0
    if [[ ${dataset_dir,,} =~ \.ya?ml$ ]] && grep -Eqs "$holds_out" "$dataset_dir"; then validation_file=$dataset_dir; fi
fi

arguments=(
    --model_name_or_path "$pretrained_model"
    --load_in_kbits "$load_in_kbits"
    --dataset_dir "$dataset_dir"
    --max_seq_length "$max_seq_length"
    --packing "$packing"
    --prompt_template "$prompt_template"
    --knowledge_probe "$knowledge_probe"
    --tuning "$tuning"
    --lora_nums "$lora_nums"
    --lora_rank "$lora_rank"
    --lora_alpha "$lora_alpha"
    --lora_dropout "$lora_dropout"
    --trainable "$lora_trainable"
    --blc_alpha "$blc_alpha"
    --blc_weight "$blc_weight"
    --kl_weight "$kl_weight"
    --learning_rate "$lr"
    --num_train_epochs "$num_train_epochs"
    --max_steps "$max_steps"
    --seed "$seed"
    --per_device_train_batch_size "$per_device_train_batch_size"
    --per_device_eval_batch_size "$per_device_eval_batch_size"
    --gradient_accumulation_steps "$gradient_accumulation_steps"
    --save_steps "$save_steps"
)
[[ $gradient_checkpointing != false ]] && arguments+=(--activation_checkpointing "$gradient_checkpointing")
[[ -n $tokenizer_path ]] && arguments+=(--tokenizer_name_or_path "$tokenizer_path")
[[ -n $peft_path ]] && arguments+=(--peft_path "$peft_path")
[[ -n $validation_file ]] && arguments+=(--validation_file "$validation_file" --eval_strategy steps --eval_steps "$eval_steps")

python=$(bash scripts/setup.sh)
# It adds the flags that depend on the hardware, starts train.py, and answers signals.
exec "$python" -m scripts.launch --output_dir="$output_dir/$exp_name" --num_processes="$num_processes" \
    --nnodes="$nnodes" --node_rank="$node_rank" --master_addr="$master_addr" --master_port="$master_port" \
    --deepspeed_config_file="$deepspeed_config_file" -- "${arguments[@]}" "$@"
