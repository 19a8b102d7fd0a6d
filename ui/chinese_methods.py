"""Methods and their settings in Simplified Chinese, by the English text that a method's file says.

The key is the English text itself: where a method's description changes, its translation is missing again, and a test
says so. Terms as in `ui.chinese`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# fmt: off
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "AWQ": "AWQ", "bitsandbytes": "bitsandbytes", "FP8": "FP8", "GPTQ": "GPTQ", "HQQ": "HQQ",
        "KV cache": "KV 缓存量化", "Mixed precision": "混合精度", "Round to nearest": "就近舍入（RTN）",
        "SmoothQuant W8A8": "SmoothQuant W8A8", "ZeroQuant": "ZeroQuant", "Depth pruning": "深度剪枝",
        "Gradual magnitude pruning": "渐进幅值剪枝", "L1 training and pruning": "L1 训练与剪枝", "Low rank": "低秩分解",
        "Magnitude pruning": "幅值剪枝", "SparseGPT": "SparseGPT", "Vocabulary pruning": "词表剪枝", "Wanda": "Wanda",
        "Width pruning": "宽度剪枝", "Feature distillation": "特征蒸馏", "Logit distillation": "Logit 蒸馏",
        "On-policy distillation": "同策略蒸馏", "Self-repair": "自修复", "Sequence distillation": "序列蒸馏",
    }
)

SUMMARIES: Mapping[str, str] = MappingProxyType(
    {
        "Scale the channels with large activations up before rounding, and undo it in the operation before.":
            "舍入之前放大激活值较大的通道，并在前一个运算中抵消。",
        "The schemes of the bitsandbytes library: LLM.int8(), NF4 and FP4, in the files that everybody reads.":
            "bitsandbytes 库的方案：LLM.int8()、NF4 和 FP4，保存为通用的文件格式。",
        "8-bit floating-point weights, and inputs if wanted: the e4m3 format of recent GPUs.":
            "8 位浮点权重，输入也可选：新一代 GPU 的 e4m3 格式。",
        "Quantize column by column and let the columns that follow make up for each rounding error.":
            "逐列量化，让后面的列补偿每一次舍入误差。",
        "Fit each group's grid to its weights robustly, without calibration: half-quadratic quantization.":
            "无需校准，稳健地为每组权重拟合网格：半二次量化。",
        "Hold keys and values in 8 or 4 bits while generating, so that long texts and batches take less memory.":
            "生成时用 8 位或 4 位保存键和值，使长文本和大批次占用更少内存。",
        "Give each linear the bits it needs: measure every linear once per option, then spend a budget where it counts.":
            "给每个线性层所需的位数：对每种选项逐层测量，再把预算花在最值得的地方。",
        "Round each weight to the nearest level of a min-max grid.": "把每个权重舍入到最小–最大网格中最近的一级。",
        "8-bit weights and 8-bit activations, after moving the activations' outliers into the weights.":
            "先把激活值的离群值转移到权重，再对权重和激活值都做 8 位量化。",
        "Weights in groups, 8-bit activations for each token, and where asked for each block taught by its original.":
            "权重分组量化，激活值逐词元 8 位量化，需要时每一层再由其原始层来教。",
        "Remove whole blocks: those that change the text's states least, or that the model predicts best without.":
            "移除整层：对隐藏状态改变最小，或去掉后模型预测仍最好的那些层。",
        "Set ever more of the smallest weights to zero while the model trains on: fast at first, then slower and slower.":
            "边训练边把越来越多的最小权重置零：先快，后越来越慢。",
        "Train with a price on every weight, so that many become small; cut the smallest; let the others recover.":
            "训练时给每个权重加上代价，使许多权重变小；剪去最小的；其余的再恢复。",
        "Replace each linear by two smaller ones: its best approximation of low rank for the inputs that it really gets.":
            "用两个较小的线性层替换一个：针对实际输入的最佳低秩近似。",
        "Set the weights with the smallest magnitude to zero, of each linear or of all together.":
            "把幅值最小的权重置零，可逐个线性层，也可全部一起比较。",
        "Set weights to zero column by column and let the columns that follow make up for each.":
            "逐列把权重置零，让后面的列来补偿。",
        "Drop the tokens that a given text never uses: embeddings, head and tokenizer together, ids renumbered.":
            "去掉给定文本从未用到的词元：词嵌入、输出头和分词器一并处理，并重新编号。",
        "Set the weights whose magnitude times input norm is smallest in their row to zero.":
            "在每一行中，把“幅值 × 输入范数”最小的权重置零。",
        "Make every block narrower: remove the feed-forward neurons, attention heads or channels that matter least.":
            "让每一层变窄：移除最不重要的前馈神经元、注意力头或通道。",
        "Teach a student what the teacher computes inside: hidden states and attention maps, beside its predictions.":
            "除预测外，还把教师内部的计算教给学生：隐藏状态和注意力图。",
        "Train a smaller student to predict as the model does: softened logits and true labels.":
            "训练较小的学生模型，使其预测与原模型一致：软化的 logits 加真实标签。",
        "Let the student write, and teach it on what it wrote: what it meets in use is what it learns from.":
            "让学生自己写，再在它写的内容上教它：使用中会遇到什么，就从什么中学习。",
        "Heal the model that earlier steps pruned or quantized: train it to predict as the original does.":
            "修复前面步骤剪枝或量化过的模型：训练它像原始模型一样预测。",
        "Let the teacher write continuations once, and train the student on them as if they were the text.":
            "让教师先写一遍续文，再把这些续文当作训练文本来训练学生。",
    }
)

DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "Which linears: patterns such as `*.mlp.*`; empty: all.": "处理哪些线性层：`*.mlp.*` 之类的模式；留空表示全部。",
        "Linears to leave as they are, patterns as above.": "保持不变的线性层，模式写法同上。",
        "Bits of each integer code.": "每个整数码的位数。",
        "What shares one scale: a group of inputs, a row, a matrix.": "共用一个缩放系数的范围：一组输入、一行或整个矩阵。",
        "Inputs that share one scale, with granularity `group`.": "粒度为 `group` 时，共用一个缩放系数的输入数。",
        "Levels symmetric around zero; else each scale has a zero point.": "各级以零对称；否则每个缩放系数另有一个零点。",
        "Narrow each range where that lowers the squared error (mse).": "若能降低平方误差（mse），则收窄取值范围。",
        "The output head, too.": "输出头也处理。",
        "The output head, too, where it is not the embeddings: the library knows no embeddings.":
            "输出头也处理（前提是它不与词嵌入共用）：该库不支持词嵌入。",
        "The embeddings, too: 8 bits, one scale for each token's row.": "词嵌入也处理：8 位，每个词元的一行用一个缩放系数。",
        "Calibration sequences that are read.": "读取的校准序列数。",
        "Tokens of each calibration sequence.": "每条校准序列的词元数。",
        "Of a mixture, what calibrates an expert: the tokens that its router sends it, or all.":
            "混合专家模型中用什么校准专家：路由器分给它的词元，或全部词元。",
        "Every token counts alike, also where activations are huge.": "每个词元权重相同，即使激活值极大。",
        "4-bit NormalFloat, 4-bit float, or LLM.int8().": "4 位 NormalFloat、4 位浮点，或 LLM.int8()。",
        "With 4 bits: quantize the scales of the blocks, too.": "4 位时：分块的缩放系数也量化。",
        "With int8: inputs above it stay 16 bit.": "int8 时：超过此值的输入保持 16 位。",
        "Inputs as they are, or FP8 with a scale a token.": "输入保持原样，或用 FP8、每个词元一个缩放系数。",
        "Solve the columns with the largest inputs first.": "先求解输入最大的列。",
        "Share of the mean diagonal that is added to H.": "加到 H 上的量，以对角线均值的比例表示。",
        "Fraction of weights set to zero meanwhile; with a pattern always half.":
            "同时置零的权重比例；使用 N:M 模式时总是一半。",
        "Other bits for some linears, the first that fits: `*.down_proj=8 *.0.*=6`.":
            "某些线性层使用其他位数，按第一个匹配的模式：`*.down_proj=8 *.0.*=6`。",
        "Where these zeros may fall: anywhere, or N in each M inputs.": "零可以落在哪里：任意位置，或每 M 个输入中 N 个。",
        "The p of the error's norm; lower forgives outliers more.": "误差范数的 p；越小越能容忍离群值。",
        "How often codes and grid are fitted in turn.": "编码与网格交替拟合的次数。",
        "The b of the first turn, for errors in steps.": "第一轮的 b，误差以步长为单位。",
        "Bits of each number.": "每个数的位数。",
        "Tokens (keys) or channels (values) that share a scale.": "共用一个缩放系数的词元数（键）或通道数（值）。",
        "Newest tokens that stay exact, at least.": "至少保持精确的最新词元数。",
        "How much may be stored, scales included.": "最多可存储多少，含缩放系数。",
        "Of the budget: bits a quantized weight, or MiB of the whole model, on disk or in memory.":
            "预算的单位：每个量化权重的位数，或整个模型在磁盘或内存中的 MiB。",
        "The a above: how much of the outliers weights take on.": "上文的 a：权重承担多少离群值。",
        "One scale for each token as it comes, or one for all that calibration fixes.":
            "每个词元到来时各用一个缩放系数，或由校准确定统一的一个。",
        "Optimizer steps for each block; 0: rounding alone.": "每一层的优化步数；0 表示只做舍入。",
        "Of the distillation (Adam).": "蒸馏（Adam）所用。",
        "Share of the blocks that is removed.": "移除的层的比例。",
        "How many blocks are removed; 0: as `share` says.": "移除多少层；0 表示按 `share`。",
        "What speaks for a block: how far it moves the states, or the text's perplexity.":
            "如何评判一层：它对隐藏状态的改变，或文本的困惑度。",
        "Remove blocks that follow each other, judged as one run.": "移除相邻的层，作为一个整体评判。",
        "Tokens of each sequence.": "每条序列的词元数。",
        "Training text: `demo`, or a text or JSONL file.": "训练文本：`demo`，或文本文件、JSONL 文件。",
        "Optimizer steps.": "优化步数。",
        "Sequences in each step.": "每一步的序列数。",
        "Highest learning rate; 0: by the size of the model, 0.001 at most.":
            "最高学习率；0 表示按模型大小决定，不超过 0.001。",
        "Sequences of a step that are computed together; 0: all. Fewer take less memory.":
            "一步之中同时计算的序列数；0 表示全部。越少越省内存。",
        "Compute each block again in the backward pass: a third more time, far less memory.":
            "反向传播时重新计算每一层：多用三分之一时间，内存少得多。",
        "Fraction of weights set to zero; the patterns 2:4 and 4:8 are always half.":
            "置零的权重比例；2:4 和 4:8 模式总是一半。",
        "Where the zeros may fall: anywhere, or N in each M inputs.": "零可以落在哪里：任意位置，或每 M 个输入中 N 个。",
        "Zeros in the file: stored as numbers that anybody reads, or as bits, smaller, for Maquette alone.":
            "文件中的零：存为人人可读的数，或存为更小的位图（仅 Maquette 可读）。",
        "Whose inputs are measured: those of blocks already pruned, as in the paper's code, or the original's, which are "
        "kept for other ratios.":
            "测量谁的输入：已剪枝各层的输入（与论文代码一致），或原始模型的输入（会保留，供其他比例使用）。",
        "Steps between two cuts.": "两次剪除之间的步数。",
        "Share of the steps after which the full sparsity is reached.": "达到目标稀疏度所用步数的比例。",
        "Price of each unit of |w|; 0 is magnitude pruning.": "每单位 |w| 的代价；0 即幅值剪枝。",
        "Share of the steps before the cut; the others recover.": "剪除之前的步数比例；其余用于恢复。",
        "What remains of the linears' weights, as a fraction.": "线性层权重保留的比例。",
        "Where the weights go: where they save the most error, or equally everywhere.":
            "权重如何分配：分给最能减少误差之处，或处处均等。",
        "Ranks are multiples of this: kernels and groups of later quantization want 32.":
            "秩取此数的倍数：算子和后续量化的分组需要 32。",
        "Share of the mean diagonal that is added to X Xᵀ.": "加到 X Xᵀ 上的量，以对角线均值的比例表示。",
        "The smallest weights of each linear, or of all together; patterns know no difference.":
            "每个线性层中最小的权重，或全部一起比较；对 N:M 模式没有区别。",
        "Text whose tokens stay: `demo`, or a text or JSONL file. Give much of it.":
            "保留其词元的文本：`demo`，或文本文件、JSONL 文件。请多给一些。",
        "Share of each block's feed-forward neurons to remove.": "每一层移除的前馈神经元比例。",
        "Share of attention heads to remove, whole key-value groups.": "移除的注意力头比例，按整个键值组计。",
        "Share of the model's channels (hidden size) to remove.": "移除的模型通道（隐藏维度）比例。",
        "Importance: norms of activations, or what the loss changes to first order.":
            "重要性：激活值的范数，或损失的一阶变化。",
        "Widths stay multiples of it: kernels and packed formats want 32, GGUF's best formats 256.":
            "宽度保持为此数的倍数：算子和打包格式需要 32，GGUF 的最佳格式需要 256。",
        "Every k-th block of the model, a new network of a size, the model as it is, or a checkpoint.":
            "每 k 层取一层、指定尺寸的新网络、模型现状，或一个检查点。",
        "With student `blocks`: keep every k-th block.": "学生为 `blocks` 时：每 k 层保留一层。",
        "With student `size`: width of the new network.": "学生为 `size` 时：新网络的宽度。",
        "With student `size`: blocks of the new network.": "学生为 `size` 时：新网络的层数。",
        "With student `folder`: a checkpoint with the same tokenizer; `demo`, owner/name of the hub (@revision), "
        "or a folder.":
            "学生为 `folder` 时：使用同一分词器的检查点；可写 `demo`、Hub 上的 owner/name（可加 @修订版）或文件夹。",
        "More teachers: `demo`, owner/name of the hub (@revision), or folders, separated by spaces, or in quotes; "
        "probabilities are averaged.":
            "更多教师：`demo`、Hub 上的 owner/name（可加 @修订版）或文件夹，以空格分隔，或加引号；概率取平均。",
        "KL to the teacher (forward), from it (reverse, MiniLLM), or between both (js, as in GKD).":
            "对教师的前向 KL（`forward`）、反向 KL（`reverse`，MiniLLM），或二者之间（`js`，如 GKD）。",
        "With divergence `js`: near 0 forward KL, near 1 reverse.": "散度为 `js` 时：接近 0 为前向 KL，接近 1 为反向。",
        "Softens both distributions; 1 changes nothing.": "软化两个分布；1 表示不变。",
        "Weight of the true labels beside the teacher.": "真实标签相对教师的权重。",
        "Weight of the hidden states; 0: they do not count.": "隐藏状态的权重；0 表示不计。",
        "Weight of the attention maps; 0: not asked for, and fast attention.":
            "注意力图的权重；0 表示不计算，可用快速注意力。",
        "Ask the teacher once and keep its top_k answers on disk, or ask at each step for all of them.":
            "只问教师一次并把 top_k 个答案存盘，或每一步都取全部答案。",
        "With `cached`: most probable tokens that are kept, with the rest.":
            "`cached` 时：保留概率最高的多少个词元，其余合并。",
        "Models of sizes in between that are taught first, the last one teaching the student.":
            "先教会若干中间尺寸的模型，由最后一个来教学生。",
        "Weight of the true labels beside the teacher, on batches of the text.":
            "在文本批次上，真实标签相对教师的权重。",
        "Tokens of a document's or row's beginning, from which writing goes on.": "文档或行开头的词元数，由此续写。",
        "Share of the batches that the student writes.": "由学生来写的批次比例。",
        "Of the student's writing.": "学生写作时的采样温度。",
        "What may change: every weight, low-rank additions, or norms and scales.":
            "可以改变什么：全部权重、低秩增量，或归一化与缩放系数。",
        "With scope `lora`: rank of what is added to each linear.": "范围为 `lora` 时：加到每个线性层上的秩。",
        "Sequences that the teacher writes, at most one a row.": "教师所写的序列数，每行至多一条。",
        "Of the teacher's writing; 0: always the likeliest token (greedy).":
            "教师写作时的采样温度；0 表示总取概率最高的词元（贪心）。",
        "Lower rates later: `0.1 after 100` is a tenth after 100 steps; `0 after 150` ends the training.":
            "之后降低学习率：`0.1 after 100` 表示 100 步之后为十分之一；`0 after 150` 表示在该步结束训练。",
        "Learn the prompts' own tokens too.": "提示词本身的词元也学习。",
    }
)

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "activation_order": "按激活值排序", "activations": "激活值", "allocation": "分配方式", "assistants": "助教模型数",
        "attention_weight": "注意力图权重", "batch": "批大小", "beta": "Beta", "bits": "位数", "budget": "预算",
        "by": "评判依据", "channels": "通道", "clipping": "截断", "contiguous": "相邻", "count": "数量",
        "damping": "阻尼", "distill_steps": "蒸馏步数", "divergence": "散度", "double_quant": "双重量化",
        "embeddings": "词嵌入", "equal_tokens": "词元等权", "every": "间隔步数", "experts": "专家的校准", "folder": "文件夹",
        "gradient_checkpointing": "梯度检查点", "granularity": "粒度", "group_size": "组大小", "head": "输出头", "heads": "注意力头", "hidden_size": "隐藏维度",
        "hidden_weight": "隐藏状态权重", "ignore": "忽略", "inputs": "输入", "keep_every": "每几层留一层", "label_weight": "标签权重",
        "learn_prompts": "学习提示词", "learning_rate": "学习率", "learning_rate_factors": "学习率系数", "micro_batch": "微批大小", "multiple": "倍数", "neurons": "神经元",
        "norm": "范数", "num_blocks": "层数", "overrides": "例外位数", "pattern": "模式", "penalty": "惩罚", "prompt_tokens": "提示词元数",
        "ramp": "上升段", "rank": "秩", "ratio": "保留比例", "samples": "校准样本数", "sampling_temperature": "采样温度",
        "scheme": "方案", "scope": "范围", "sequence_length": "序列长度", "sequences": "序列数", "share": "比例",
        "sparsity": "稀疏度", "steps": "步数", "storage": "存储方式", "strength": "平滑强度", "student": "学生",
        "student_share": "学生写作比例", "symmetric": "对称", "targets": "目标", "teacher_logits": "教师 logits",
        "teachers": "教师", "temperature": "温度", "text": "文本", "threshold": "阈值", "top_k": "Top-k",
        "turns": "轮数", "unit": "单位", "window": "窗口",
    }
)

CHOICES: Mapping[str, str] = MappingProxyType(
    {
        "group": "分组", "channel": "按行", "tensor": "整个张量", "token": "按词元", "none": "无", "mse": "按平方误差",
        "unstructured": "任意位置", "bits": "每权重位数", "mib": "MiB", "memory": "内存 MiB", "activation": "激活值", "influence": "影响",
        "taylor": "泰勒展开", "angle": "角度", "perplexity": "困惑度", "greedy": "贪心", "dense": "稠密", "bitmask": "位图",
        "uniform": "均等", "water-filling": "注水法", "global": "全局", "all": "全部", "lora": "LoRA",
        "norms and scales": "归一化与缩放系数", "linear": "逐线性层", "blocks": "每 k 层取一层", "size": "指定尺寸",
        "current": "维持现状", "folder": "检查点文件夹", "forward": "前向", "reverse": "反向", "js": "JS",
        "original": "原始模型", "pruned": "已剪枝", "routed": "分给它的", "cached": "缓存", "live": "实时", "int8": "int8", "nf4": "NF4", "fp4": "FP4", "2:4": "2:4", "4:8": "4:8",
    }
)

# The first word of a step in a recipe's title, which says its method.
STEPS: Mapping[str, str] = MappingProxyType(
    {
        "bitsandbytes": "bitsandbytes", "KV-cache": "KV 缓存", "Mixed": "混合位宽", "SmoothQuant": "SmoothQuant",
        "ZeroQuant": "ZeroQuant", "Depth": "深度剪枝", "Gradual": "渐进剪枝", "L1": "L1 剪枝", "Low-rank": "低秩分解",
        "Magnitude": "幅值剪枝", "SparseGPT": "SparseGPT", "Vocabulary": "词表剪枝", "Wanda": "Wanda",
        "Width": "宽度剪枝", "Features": "特征蒸馏", "Distilled": "Logit 蒸馏", "On-policy": "同策略蒸馏",
        "Repair": "自修复", "Sequence": "序列蒸馏",
        "RTN": "RTN", "GPTQ": "GPTQ", "AWQ": "AWQ", "HQQ": "HQQ", "FP8": "FP8",
    }
)
# What follows it, as patterns; in their order.
SETTINGS: tuple[tuple[str, str], ...] = (
    (r"\b([\d.]+) bit\b", r"\1 位"), (r"\b(\d+%) of blocks\b", r"\1 的层"), (r"\b(\d+%) of neurons\b", r"\1 神经元"),
    (r"\b(\d+%) of heads\b", r"\1 注意力头"), (r"\b(\d+%) of channels\b", r"\1 通道"), (r"\b([\d/]+) blocks\b", r"\1 层"),
)
# fmt: on
