#!/usr/bin/env bash
# Train a mixture of LoRA experts. Every value below can be overridden from the environment, and further flags of
# train.py can be added:   lora_rank=8 exp_name=rank8 bash run_loramoe.sh --weight_decay 0.01
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# A relative path is resolved against the caller's folder ($OLDPWD), or against this repository if only that has it.
if [[ $OLDPWD != "$PWD" ]]; then
    for name in pretrained_model tokenizer_path peft_path dataset_dir validation_file deepspeed_config_file output_dir; do
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
dataset_dir=${dataset_dir:-data/tiny_data/train}    # training rows: .json, .jsonl or .parquet file, or a folder of them
validation_file=${validation_file-auto}             # held-out rows; empty: none; auto: the tiny data's, if trained on it
max_seq_length=${max_seq_length:-1024}              # tokens; longer rows are cut at the end
prompt_template=${prompt_template:-auto}            # plain, chat, or auto (chat where the tokenizer has a template)

# ---- method (the paper's settings) -----------------------------------------------------------------------------------
tuning=${tuning:-loramoe}                           # loramoe, or full (all weights: the paper's main baseline)
lora_nums=${lora_nums:-6}                           # experts per adapted Linear; 1 is plain LoRA
lora_rank=${lora_rank:-4}                           # rank of each expert
lora_alpha=${lora_alpha:-32}                        # the experts' output is scaled by lora_alpha / lora_rank
lora_dropout=${lora_dropout:-0.05}                  # probability of dropping an input element of the experts
lora_trainable=${lora_trainable:-auto}              # Linears to adapt: names, all-linear, a pattern, or auto
blc_alpha=${blc_alpha:-0.1}                         # delta: how far a group of experts is drawn to its task type
blc_weight=${blc_weight:-0.1}                       # beta: weight of the balance term in the loss; 0 turns it off

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
    if [[ $flag == --output_dir* ]]; then
        echo "error: the run's folder is output_dir/exp_name: set these two variables in place of --output_dir" >&2
        exit 1
    fi
done
for name in num_processes nnodes node_rank; do
    if [[ ! ${!name} =~ ^[0-9]*$ || (${!name} == 0 && $name != node_rank) ]]; then
        echo "error: $name is '${!name}', but has to be a whole number$([[ $name == node_rank ]] || echo " of at least 1")" >&2
        exit 1
    fi
done
if ((node_rank >= nnodes)); then
    echo "error: node_rank is $node_rank, but with nnodes=$nnodes the nodes have the numbers 0 to $((nnodes - 1))" >&2
    exit 1
fi

# As a shell completes the name of a folder.
pretrained_model=${pretrained_model%/} dataset_dir=${dataset_dir%/}

python=$(bash scripts/setup.sh)
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if [[ $pretrained_model == models/SmolLM2-135M-Instruct ]]; then
    "$python" -m scripts.fetch_base_model
fi

# Ask torch for the number of GPUs, since it minds CUDA_VISIBLE_DEVICES, and for their half precision.
found=$("$python" -c '
import sys, torch
gpus = torch.cuda.device_count()  # of the driver; CUDA may not start on them all the same
if gpus and not torch.cuda.is_available():
    sys.exit(
        f"error: there are GPUs ({gpus}), but CUDA does not start: see whether nvidia-smi shows a driver that is too "
        f"old for CUDA {torch.version.cuda}, which this torch is built for, and what CUDA_VISIBLE_DEVICES says; "
        "CUDA_VISIBLE_DEVICES= bash run_loramoe.sh trains on the CPU"
    )
print(gpus, "bf16" if gpus and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")')
read -r gpus half <<<"$found"
if ((gpus > 0)); then
    hardware=(--"$half" true)
    [[ $deepspeed_config_file == auto ]] && deepspeed_config_file=scripts/deepspeed/zero2.json
else
    echo "no GPU found, training on the CPU"
    hardware=(--use_cpu true)
    export DS_ACCELERATOR=cpu
    [[ $deepspeed_config_file == auto ]] && deepspeed_config_file=""
fi
num_processes=${num_processes:-$((gpus > 0 ? gpus : 1))}
if ((gpus > 0 && num_processes > gpus)); then
    echo "error: num_processes is $num_processes, but each needs a GPU of its own, and $gpus can be seen here" >&2
    exit 1
fi
if [[ $validation_file == auto ]]; then
    if [[ $dataset_dir == data/tiny_data/train ]]; then validation_file=data/tiny_data/test.json; else validation_file=""; fi
fi

arguments=(
    --model_name_or_path "$pretrained_model"
    --load_in_kbits "$load_in_kbits"
    --dataset_dir "$dataset_dir"
    --max_seq_length "$max_seq_length"
    --prompt_template "$prompt_template"
    --tuning "$tuning"
    --lora_nums "$lora_nums"
    --lora_rank "$lora_rank"
    --lora_alpha "$lora_alpha"
    --lora_dropout "$lora_dropout"
    --trainable "$lora_trainable"
    --blc_alpha "$blc_alpha"
    --blc_weight "$blc_weight"
    --learning_rate "$lr"
    --num_train_epochs "$num_train_epochs"
    --max_steps "$max_steps"
    --seed "$seed"
    --per_device_train_batch_size "$per_device_train_batch_size"
    --per_device_eval_batch_size "$per_device_eval_batch_size"
    --gradient_accumulation_steps "$gradient_accumulation_steps"
    --output_dir "$output_dir/$exp_name"
    --num_processes "$((num_processes * nnodes))"
    --save_steps "$save_steps"
    "${hardware[@]}"
)
[[ $gradient_checkpointing != false ]] && arguments+=(--activation_checkpointing "$gradient_checkpointing")
[[ -n $tokenizer_path ]] && arguments+=(--tokenizer_name_or_path "$tokenizer_path")
[[ -n $peft_path ]] && arguments+=(--peft_path "$peft_path")
[[ -n $validation_file ]] && arguments+=(--validation_file "$validation_file" --eval_strategy steps --eval_steps "$eval_steps")
[[ -n $deepspeed_config_file ]] && arguments+=(--deepspeed "$deepspeed_config_file")
arguments+=("$@")

# Check everything and encode the data once, before any process group exists and any weight is read.
"$python" train.py "${arguments[@]}" --prepare_only true

launch=("$python")
if ((gpus > 0 || num_processes > 1 || nnodes > 1)) || [[ -n $deepspeed_config_file ]]; then
    launch+=(-m torch.distributed.run --signals_to_handle SIGINT,SIGHUP,SIGQUIT --nproc_per_node "$num_processes")
    if ((nnodes == 1)) && [[ -z $master_port ]]; then
        launch+=(--standalone)
    else
        launch+=(--nnodes "$nnodes" --node_rank "$node_rank" --master_addr "$master_addr" --master_port "${master_port:-29500}")
    fi
    # torchrun would give each process one thread, but offloading runs the optimizer on the CPU.
    threads=$(($(nproc) / num_processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi

# The terminal shows everything, the run's folder keeps it, and the exit code is the trainer's, not tee's.
exec 3> >(trap '' INT HUP PIPE; exec tee -a "$output_dir/$exp_name/train.log")
tee=$!
# In a session of its own, since Ctrl-C and a terminal that closes send their signals to all processes of this one. SIGTERM
# is ignored until train.py can answer it, and by torchrun always, which would end its workers without waiting for them.
(trap '' TERM; exec setsid "${launch[@]}" train.py "${arguments[@]}" --restart false) >&3 2>&1 &
trainer=$!
stopped=false
# The processes that run train.py.
workers() {
    if ((${#launch[@]} == 1)); then echo "$trainer"; return; fi
    grep -lsx "PPid:[[:space:]]*$trainer" /proc/[0-9]*/status | cut -d/ -f3 || true
}
# They get the signal until they end, since one that has only just been started has missed it. Where torchrun has none, it
# might wait for other nodes for long; a child that it has for a moment while it starts is none.
stop_training() {
    stopped=true
    (
        polls_without=0
        while kill -0 "$trainer"; do
            if [[ -n $(workers) ]]; then
                polls_without=0
                kill -TERM $(workers) || true
            elif ((++polls_without == 2)); then
                kill -USR1 "$trainer" || true
            fi
            sleep 1
        done
    ) 3>&- &
} 2>/dev/null
trap stop_training TERM INT HUP
status=0
wait "$trainer" || status=$?
while kill -0 "$trainer" 2>/dev/null; do # a forwarded signal ends the wait before it ends the trainer
    status=0
    wait "$trainer" || status=$?
done
exec 3>&-
wait "$tee" 2>/dev/null || true
# A run that was stopped ends cleanly but is not finished: job chains see 143, as of a process ended by SIGTERM. 138 is
# SIGUSR1 above.
if [[ $stopped == true && ($status == 0 || $status == 138) ]]; then
    if [[ -f $output_dir/$exp_name/all_results.json ]]; then status=0; else status=143; fi
fi
exit "$status"
