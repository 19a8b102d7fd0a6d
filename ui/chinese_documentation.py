"""What the methods' files say about themselves in Simplified Chinese, paragraph by paragraph.

The key is the English paragraph with its words on one line: where it changes, its translation is missing again, and a
test says so. Lists and formulas are written as in the files. Terms as in `ui.chinese`; papers keep their titles.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# fmt: off
DOCUMENTATION: Mapping[str, str] = MappingProxyType(
    {
        # quantize/awq
        "AWQ (Lin et al., 2023, \"AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration\", "
        "arXiv 2306.00978). A few input channels carry most of what a linear computes. Multiplied by s > 1 before "
        "rounding, with the activations divided by s where they are made, their relative rounding error falls by up "
        "to s. Needs a little calibration text; robust at 4 bits.":
            "AWQ（Lin 等，2023，“AWQ: Activation-aware Weight Quantization for LLM Compression and "
            "Acceleration”，arXiv 2306.00978）。线性层的计算结果大多由少数几个输入通道决定。舍入前把这些通道的权重乘以 s > 1，并在产生激活值的地方把"
            "激活值除以 s，它们的相对舍入误差最多可降为原来的 1/s。需要少量校准文本；4 位时很稳健。",
        "For each place where a scale can be folded (see `_fold.py`), with x the root mean square of each channel:":
            "对每个可以把缩放系数并入前一运算的位置（见 `_fold.py`），以 x 表示各通道的均方根，取",
        "and the a is taken whose weights, rounded, change the readers' outputs least. The change is computed from "
        "the second moments H of the inputs, |(Q(W s) / s - W) X|² = tr(D H Dᵀ), without running the model again, "
        "and of a large matrix from every so many rows; experts of a mixture, which share the scale, count by the "
        "tokens that reach them. Then ranges are clipped where that lowers the error (`clipping`), each column "
        "counting by its inputs.":
            "并选用舍入后使后续线性层输出变化最小的 a。变化由输入的二阶矩 H 算出，即 |(Q(W s) / s - W) X|² = tr(D H Dᵀ)，无需再次运行模型；矩阵"
            "很大时，只取每隔若干行的一行；混合专家模型的各专家共用缩放系数，按到达的词元数计权。然后在能降低误差之处收窄取值范围（`clipping`），各列按其输入计权。",
        "By hand, x = (1, 16), a = 1/2: x^a = (1, 4), divided by sqrt(4) = 2 gives s = (0.5, 2).":
            "手算示例：x = (1, 16)，a = 1/2：x^a = (1, 4)，除以 sqrt(4) = 2，得 s = (0.5, 2)。",
        # quantize/bitsandbytes
        "- `nf4`, `fp4` (Dettmers et al., 2023, \"QLoRA: Efficient Finetuning of Quantized LLMs\", arXiv "
        "2305.14314): 4 bits a weight in blocks of 64, on levels that suit normally distributed weights (NF4) or on "
        "those of a 4-bit float. With `double_quant` the blocks' scales are quantized too: 4.13 bits a weight "
        "instead of 4.5. - `int8` (Dettmers et al., 2022, \"LLM.int8(): 8-bit Matrix Multiplication for Transformers "
        "at Scale\", arXiv 2208.07339): 8-bit weights and inputs, but input channels with a magnitude above "
        "`threshold` are computed in 16 bits. How many channels that is, is measured on calibration text and shown "
        "for each linear.":
            "- `nf4`、`fp4`（Dettmers 等，2023，“QLoRA: Efficient Finetuning of Quantized LLMs”，arXiv "
            "2305.14314）：每个权重 4 位，每 64 个为一个分块，各级或适合正态分布的权重（NF4），或取自 4 位浮点数。开启 `double_quant` 时，分块的"
            "缩放系数也量化：每权重 4.13 位，而不是 4.5 位。\n- `int8`（Dettmers 等，2022，“LLM.int8(): 8-bit Matrix "
            "Multiplication for Transformers at Scale”，arXiv 2208.07339）：权重和输入均为 8 位，但幅值超过 "
            "`threshold` 的输入通道以 16 位计算。这样的通道有多少，会在校准文本上测出，并按线性层列出。",
        "Needs no calibration otherwise, takes seconds, and holds one block at a time. Weights become the library's own "
        "modules, and are written before they compute for the first time: on some processors the first product repacks "
        "4-bit weights, and files written afterwards are wrong. 4 bits are refused where a linear's inputs are not a multiple of 64 or "
        "its outputs of 32: there the library computes something else on a CPU without saying so.":
            "除此之外无需校准，几秒即可完成，内存中一次只有一个块。权重变成该库自己的模块，并在首次计算之前写入文件：在某些处理器上，第一次乘法会重新排列 4 位权重，之后写出的文件就是错的。若线性层的输入"
            "数不是 64 的倍数，或输出数不是 32 的倍数，则拒绝 4 位：此时该库在 CPU 上会计算出别的结果，而且不作提示。",
        # quantize/fp8
        "FP8 (Micikevicius et al., 2022, \"FP8 Formats for Deep Learning\", arXiv 2209.05433): a sign, 4 bits of "
        "exponent, 3 of mantissa, up to 448. Each row of a weight is scaled so that its largest value becomes 448; "
        "with `activations` each token's inputs are, too, as they come. No calibration. Relative precision is the "
        "same for large and small values, so outliers harm less than with integers; weights of the same size are "
        "coarser than with 8-bit integers.":
            "FP8（Micikevicius 等，2022，“FP8 Formats for Deep Learning”，arXiv 2209.05433）：1 位符号、4 位指数"
            "、3 位尾数，最大 448。权重的每一行都经缩放，使最大值变为 448；设置 `activations` 后，每个词元的输入也在到来时这样处理。无需校准。数值大小不同，相"
            "对精度却相同，所以离群值的危害比整数格式小；大小相近的权重则比用 8 位整数时粗糙。",
        "Files are half as large. With inputs in FP8 an NVIDIA GPU from compute capability 9.0 on multiplies both "
        "itself. Elsewhere, and with weights alone, what computes is **simulated**: the values are those of FP8, the "
        "products are done in bfloat16, so nothing is faster and memory does not shrink. Servers with FP8 kernels "
        "read the same files.":
            "文件减半。输入也为 FP8 时，计算能力 9.0 及以上的 NVIDIA GPU 直接对两者做乘法。在其他设备上，以及只量化权重时，计算是**模拟**的：数值是 FP8 "
            "的，乘法用 bfloat16 进行，因此既不更快，内存也不减少。带 FP8 算子的服务程序可读取同样的文件。",
        # quantize/gptq
        "GPTQ (Frantar et al., 2022, arXiv 2210.17323). Minimises |XW - XQ|² for each linear with the Hessian H = 2 "
        "X Xᵀ of calibration inputs. Needs calibration text, no training; the best choice at 4 bits and below among "
        "the weight-only schemes here that give all linears the same bits (`quantize/mixed` does not).":
            "GPTQ（Frantar 等，2022，arXiv 2210.17323）。对每个线性层最小化 |XW - XQ|²，其中 Hessian 矩阵 H = 2 X Xᵀ "
            "由校准输入得出。需要校准文本，无需训练；在这里给所有线性层同样位数的仅权重方案中，是 4 位及以下的首选（"
            "`quantize/mixed` 则逐层分配位数）。",
        "The weight is worked through column by column, in slices (`engine.solver`); the codes are those of the "
        "paper, read from H itself instead of the Cholesky factor of H⁻¹ (Chen et al., 2025, \"The Geometry of LLM "
        "Quantization: GPTQ as Babai's Nearest Plane Algorithm\", arXiv 2507.18553). By hand, with the grid of whole "
        "numbers, w = (0.6, 0.6) and the factor M = [[1, -1], [0, 2]] of H = M Mᵀ: q_0 = 1 leaves -0.4, so w_1 "
        "counts as 0.6 + -0.4 * -1/2 = 0.8 and q_1 = 1.":
            "权重按切片逐列处理（`engine.solver`）；编码与论文相同，但直接由 H 得出，而不是由 H⁻¹ 的 Cholesky 因子得出（Chen 等，2025，“"
            "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm”，arXiv "
            "2507.18553）。手算示例：网格为整数，w = (0.6, 0.6)，H = M Mᵀ 的因子 M = [[1, -1], [0, 2]]：q_0 = 1 留下 "
            "-0.4，于是 w_1 按 0.6 + -0.4 * -1/2 = 0.8 计，q_1 = 1。",
        "Activation order is *static*: columns are solved in the order of falling H_jj, but every column keeps the "
        "group, and so the scale, of its place in the row. Files need no index then, and kernels stay fast. Tokens "
        "count alike: each input is scaled to length 1 before it enters H. Some tokens, the start token above all, "
        "have activations tens of times larger (Sun et al., 2024, \"Massive Activations in Large Language Models\", "
        "arXiv 2402.17762); unscaled, they decide the whole solution and the other tokens pay. On the demo model at "
        "3 bits that is KL 0.0164 against 0.0218; the published objective is there with `equal_tokens` off.":
            "激活值排序是*静态*的：各列按 `H_jj` 从大到小求解，但每一列保留其在行中原位置所属的组，因而也保留其缩放系数。这样文件无需索引，算子依然快。各词元权重相同：每个输"
            "入先缩放到长度 1 再计入 H。有些词元，尤其是起始词元，激活值比其他词元大几十倍（Sun 等，2024，“Massive Activations in Large "
            "Language Models”，arXiv 2402.17762）；若不缩放，整个解由它们决定，代价由其他词元承担。在演示模型上、3 位时，KL 为 0.0164，不缩"
            "放则为 0.0218；关闭 `equal_tokens` 即为论文的目标函数。",
        "With `sparsity` or a `pattern`, weights become zero in the same pass as the others are rounded (Frantar & "
        "Alistarh, 2023, arXiv 2301.00774, section 3.5): those whose removal costs least, in each slice of 128 "
        "columns, and the columns that follow make up for zeros and rounding at once. Codes of zeros take the same "
        "bits, so the file is no smaller. Zeros that an earlier pruning step made stay zeros and count among them; "
        "their rounding error is what they were moved to. With a pattern, the M columns of a group stay together in "
        "activation order.":
            "设置 `sparsity` 或 `pattern` 后，在舍入其他权重的同一遍中把部分权重置零（Frantar 和 Alistarh，2023，arXiv "
            "2301.00774，第 3.5 节）：每 128 列为一个切片，其中移除代价最小的权重置零，后面的列同时补偿置零和舍入的误差。零的编码占用同样的位数，所以文件不会更小。"
            "先前剪枝步骤产生的零保持为零，并计入其中；补偿使它们偏离零的量，即为它们的舍入误差。使用 N:M 模式时，同组的 M 列在激活值排序中保持在一起。",
        # quantize/hqq
        "HQQ (Badri and Shaji, 2023, \"Half-Quadratic Quantization of Large Machine Learning Models\"). Seconds for "
        "any model, no text needed; on the demo model clearly better than rounding to nearest at 2 bits, at 3 and 4 "
        "hardly. Minimises, for each group,":
            "HQQ（Badri 和 Shaji，2023，“Half-Quadratic Quantization of Large Machine Learning Models”"
            "）。任何模型只需几秒，不需要文本；在演示模型上，2 位时明显优于就近舍入，3 位和 4 位时几乎没有差别。对每一组最小化",
        "sum |W - (Q - z) s|^p with p < 1,":
            "    Σ |W - (Q - z) s|^p        其中 p < 1，",
        "in which a few large errors, those of outliers, count little. The half-quadratic way splits the error into "
        "E, which may be sparse, and what is left, and takes turns:":
            "其中少数大误差，即离群值的误差，影响很小。半二次方法把误差拆成可以稀疏的 E 和其余部分，并轮流求解：",
        "E = shrink(W - (Q - z) s) shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / b), the proximal step of |x|^p Q = "
        "nearest codes of W z = round(mean(Q - (W - E) / s)) where the grid is not symmetric s = <W - E, Q - z> / <Q "
        "- z, Q - z>":
            "    E  = shrink(W - (Q - z) s)      shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / b)，即"
            " |x|^p 的近端步\n    Q  = 最接近 W 的编码\n    z  = round(mean(Q - (W - E) / s))           网格不对"
            "称时\n    s  = <W - E, Q - z> / <Q - z, Q - z>",
        "and b grows a little each turn. Two things differ from the authors' code, because files here hold integer "
        "zero points: z is rounded, and s is fitted as well. Errors are measured in steps of the grid, so that b "
        "means the same for every layer. Each group keeps the best grid it has seen; the first is that of "
        "round-to-nearest.":
            "b 每轮略微增大。由于这里的文件保存整数零点，有两点与作者的代码不同：z 取整，s 也参与拟合。误差以网格步长为单位，使 b 在每一层含义相同。每一组保留所见过的最好网格"
            "；第一个是就近舍入的网格。",
        "By hand, W = (0.9, 2.1), symmetric, Q - z = (1, 2), E = 0: s = (0.9 + 4.2) / (1 + 4) = 1.02.":
            "手算示例：W = (0.9, 2.1)，对称，Q - z = (1, 2)，E = 0：s = (0.9 + 4.2) / (1 + 4) = 1.02。",
        # quantize/kv_cache
        "KIVI (Liu et al., 2024, \"KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache\", arXiv "
        "2402.02750). No weight changes and no text is needed: whenever a group of tokens is full, its keys and "
        "values are rounded and packed, with a scale and a low (both bfloat16) for each group: 9 or 5 bits a number "
        "with groups of 32. Keys share them along tokens, one channel at a time, since some channels are large for "
        "every token; values along channels, one token at a time, so that the errors of tokens that are not attended "
        "to stay with them. The newest tokens stay as they are: those of the `window` and of the group that is not "
        "full yet. A prompt is read exactly, then packed.":
            "KIVI（Liu 等，2024，“KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache”，"
            "arXiv 2402.02750）。不改变权重，也不需要文本：每当一组词元凑满，就把它们的键和值舍入并打包，每组一个缩放系数和一个下限（均为 bfloat16）：组大小为"
            " 32 时每个数 9 位或 5 位。键沿词元方向共用，逐通道处理，因为有些通道对每个词元都很大；值沿通道方向共用，逐词元处理，使未被关注的词元的误差留在它们自己身上。最新"
            "的词元保持原样：`window` 之内的，以及尚未凑满的那一组。提示词先精确读完，再打包。",
        "Tried on the demo model with 4 bits and groups of 32. Keys: relative squared error 0.0044 along tokens, "
        "0.0065 along channels. Values are the other way round there, 0.0040 and 0.0064, at KL divergences too close "
        "to choose by; the paper's larger models decide for channels. Grids symmetric around zero have 1.5 to 1.7 "
        "times the error and take half a bit less. Windows of 32 and 128 exact tokens did not lower the KL on texts "
        "of 480 tokens by more than its error, so there is none unless it is asked for.":
            "在演示模型上用 4 位、组大小 32 试过。键：相对平方误差沿词元为 0.0044，沿通道为 0.0065。值在该模型上情况相反，为 0.0040 和 0.0064，而 "
            "KL 散度相差太小，不足以据此选择；论文中更大的模型支持沿通道。以零对称的网格误差为 1.5 至 1.7 倍，但少占半位。在 480 个词元的文本上，保留 32 或 "
            "128 个精确词元的窗口对 KL 的降低没有超过其误差，所以除非要求，否则不设窗口。",
        "Where our own kernels decode, in groups of whole 16 and heads of whole 32 channels, attention computes on "
        "the codes, and less is read. A token of a 267 M-parameter model on two CPU cores, beside other work: after "
        "512 others 22.6 ms with exact keys and values, 22.1 and 21.5 with 8 and 4 bits; after 4,096, in another run, "
        "32.8, 28.5 and 25.2. Elsewhere they are unpacked for attention, one block at a time, which takes longer than "
        "exact ones: after 512 others 43, 56 and 58 ms in torch's lean loop; 55, 72 and 77 in that of transformers, "
        "for families that neither of ours knows.":
            "在我们自己的算子解码之处（组大小为 16 的倍数，注意力头的通道数为 32 的倍数），注意力直接用整数码计算，读取的数据更少。在两个 CPU 核上、机"
            "器同时忙于其他工作时，一个 2.67 亿参数的模型生成一个词元：在 512 个词元之后，键和值精确时 22.6 ms，8 位和 4 位时 22.1 和"
            " 21.5 ms；在 4,096 个词元之后（另一次测量）为 32.8、28.5 和 25.2 ms。在其他情况下，计算注意力时逐层解包，比精确的键和"
            "值更慢：在 512 个词元之后，torch 的精简循环为 43、56 和 58 ms；对两种循环都不支持的模型系列，transformers 的循环为"
            " 55、72 和 77 ms。",
        "Perplexity, KL and accuracy are measured with all keys and values rounded, also those that generation would "
        "keep exact: what a text much longer than window and group would see. Written text, and the score of a text, "
        "use the cache as it is. The files keep the settings in config.json, where other programs ignore them.":
            "测量困惑度、KL 和准确率时，所有键和值都经过舍入，包括生成时会保持精确的那些：相当于远长于窗口和组的文本所见的情形。生成的文本，以及文本的得分，则按缓存的实际状态计算。"
            "文件在 config.json 中保存这些设置，其他程序会忽略它们。",
        # quantize/mixed
        "Mixed precision under a budget, posed as in HAWQ-V3 (Yao et al., 2021, arXiv 2011.10680): the loss of a "
        "whole assignment is taken as the sum of the losses of its parts, and the cheapest sum within the budget is "
        "looked for. Better than equal bits of the same size where linears differ in how much they can bear.":
            "在预算之内的混合精度，按 HAWQ-V3（Yao 等，2021，arXiv 2011.10680）的方式提出问题：整个分配方案的损失取各部分损失之和，并寻找预算内总损失最"
            "小的方案。当各线性层的承受力不同时，优于同等大小的统一位数。",
        "1. For each linear l and option o (bits and group size), the change of its output by rounding, relative to "
        "the output, from the second moments H of its inputs: e(l, o) = tr(D H Dᵀ) / tr(W H Wᵀ), over `EXAMINED` of its "
        "outputs. 2. How much such a change costs the model: with only l rounded to `PROBE_BITS` bits, the KL "
        "divergence k(l) of the model's predictions from the original's. A small change of an output costs in "
        "proportion to its square, so o costs k(l) e(l, o) / e(l, probe). 3. The assignment with the least total cost "
        "whose stored bits, scales and all, fit the budget: a multiple-choice knapsack, solved by dynamic programming "
        "over `CELLS` cells of the budget, and at a price for bits (Lagrange's multiplier); the better of the two is "
        "taken. The budget is never exceeded; one above the largest option counts as that. A budget of memory counts "
        "codes as kernels hold them, 2 to 4 bits in 4 and others in 8: a model that fits on the disk need not fit "
        "there. 4. GPTQ with the grid that was chosen for each linear.":
            "1. 对每个线性层 l 和每个选项 o（位数与组大小），由输入的二阶矩 H 算出舍入引起的输出相对变化：e(l, o) = "
            "tr(D H Dᵀ) / tr(W H Wᵀ)，只取其中 `EXAMINED` 个输出。"
            "\n2. 这样的变化给模型带来多大代价：只把 l 舍入到 `PROBE_BITS` 位，测模型预测与原始模型预测的 KL 散度 k(l)。输出变化较小时，代价与其平方成正比，所以 o 的代价为 k(l) e(l, o) / e(l, "
            "`PROBE_BITS`)。\n3. 求总代价最小、且存储位数（含缩放系数等）不超预算的分配：这是一个多选背包问题，一面在"
            "预算的 `CELLS` 个格子上用动态规划求解，一面给每一位定价求解（拉格朗日乘子），取两者中较好的；绝不会超出"
            "预算；高于最大选项的预算按最大选项计。内存预算按算子实际保存编码的方式计算，2 至 4 位按 4 位，其余按 8 "
            "位：磁盘上放得下的模型，内存里未必放得下。\n4. 用为每个线性层选定的网格做 GPTQ。",
        "Steps 1 and 2 do not depend on the budget. They are kept, and another budget starts at step 3. The head, "
        "where it is chosen, is one more linear under the same budget; embeddings are not, they have 8 bits. One block "
        "at a time is in memory: step 2 lets what each rounded linear makes of a text pass the blocks after it beside "
        "the original's states.":
            "第 1、2 步与预算无关，结果会保留；换一个预算从第 3 步开始。输出头若被选中，就作为同一预算下的又一个线性层；词嵌入不在其中，固定为 8 位。"
            "内存中每次只有一层：第 2 步让每个被舍入的线性层对文本产生的结果，与原始模型的隐藏状态一起逐层通过后面的层。",
        # quantize/rtn
        "Round-to-nearest, the baseline that every other scheme must beat: no calibration, hardly longer than the "
        "model takes to read and write. Good at 8 bits, acceptable at 4 with small groups, poor below. With "
        "`clipping` each range is narrowed where that lowers the squared error. See Nagel et al., 2021, \"A White "
        "Paper on Neural Network Quantization\", arXiv 2106.08295, section 2.":
            "就近舍入，是其他所有方案都必须超过的基线：无需校准，用时几乎只是读写模型的时间。8 位时良好，4 位配小组时"
            "尚可，更低则差。设置 `clipping` 后，在能降低平方误差之处收窄取值范围。见 Nagel 等，2021，“A White Paper "
            "on Neural Network Quantization”，arXiv 2106.08295，第 2 节。",
        # quantize/smoothquant
        "SmoothQuant (Xiao et al., 2022, \"SmoothQuant: Accurate and Efficient Post-Training Quantization for Large "
        "Language Models\", arXiv 2211.10438), W8A8. Weights are easy to round to 8 bits, activations are not: a few "
        "channels are many times larger than the others. Where a scale can be folded into the operation before (see "
        "`_fold.py`), channel j is divided by":
            "SmoothQuant（Xiao 等，2022，“SmoothQuant: Accurate and Efficient Post-Training "
            "Quantization for Large Language Models”，arXiv 2211.10438），W8A8。权重容易舍入到 8 位，激活值则不然：少数通"
            "道比其他通道大许多倍。在缩放系数可以并入前一运算之处（见 `_fold.py`），通道 j 除以",
        "and the weights' column multiplied by it; a = 0.5 shares the difficulty evenly. Then weights get one scale "
        "a row and inputs one a token, found as they come (`token`), or one that calibration fixed (`tensor`). "
        "Products are sums of integers: with `torch._int_mm` both the prompt and each token are faster than in "
        "bfloat16.":
            "权重的对应列乘以它；a = 0.5 时难度均分。然后权重每行一个缩放系数，输入每个词元一个，在到来时求出（`token`），或用校准确定的统一一个（`tensor`）。乘"
            "积是整数之和：使用 `torch._int_mm` 时，读取提示词和生成每个词元都比 bfloat16 快。",
        "The head, where it is chosen, has no operation before it that takes a scale: it is rounded without.":
            "输出头若被选中，其前面没有可以吸收缩放系数的运算：直接舍入。",
        "By hand, max|X| = (16, 1), max|W| = (1, 1), a = 0.5: s = (4, 1), and the inputs' maxima become (4, 1).":
            "手算示例：max|X| = (16, 1)，max|W| = (1, 1)，a = 0.5：s = (4, 1)，输入的最大值变为 (4, 1)。",
        # quantize/zeroquant
        "ZeroQuant (Yao et al., 2022, \"ZeroQuant: Efficient and Affordable Post-Training Quantization for "
        "Large-Scale Transformers\", arXiv 2206.01861). Fine grains make simple rounding good enough: a scale for "
        "each group of weights, and for each token's inputs a scale found as it comes. Where bits are few, "
        "*layer-by-layer knowledge distillation* helps (`distill_steps`, none unless asked for): one block at a "
        "time, the weights are trained so that the rounded block gives what the original block gives for the same "
        "inputs, those that the rounded blocks before it leave,":
            "ZeroQuant（Yao 等，2022，“ZeroQuant: Efficient and Affordable Post-Training Quantization for "
            "Large-Scale Transformers”，arXiv 2206.01861）。细粒度足以让简单舍入够用：每组权重一个缩放系数，每个词元"
            "的输入在到来时求一个缩放系数。位数很少时，*逐层知识蒸馏*有帮助（`distill_steps`，默认不做）：一次一层，"
            "训练权重，使舍入后的层对同样的输入（即前面已舍入各层的输出）给出与原始层相同的输出，",
        "with the gradient passed straight through the rounding, of inputs too. Only one block's weights, gradients "
        "and moments are in memory, and no labels are needed, only the calibration text; what the original gave "
        "stands in files where it is much. A block keeps its weights where training did not help.":
            "梯度直接穿过舍入（包括输入的舍入）传递。内存中只有一层的权重、梯度和优化器的矩，不需要标签，只需校准文本"
            "；原始层的输出很大时存入文件。训练没有帮助的层保留原来的权重。",
        "Products of grouped weights with 8-bit inputs have no kernel of their own here: the inputs are rounded, "
        "then the kernels of packed weights compute. With one scale a row or matrix, symmetric weights of 5 to 8 "
        "bits multiply as integers, as SmoothQuant's do.":
            "分组权重与 8 位输入的乘积在这里没有专用算子：先舍入输入，再由打包权重的算子计算。若每行或整个矩阵只有一"
            "个缩放系数，5 至 8 位的对称权重按整数相乘，与 SmoothQuant 相同。",
        # prune/depth
        "- `influence`: 1 - the mean cosine of what enters and what leaves (ShortGPT, Men et al., 2024, arXiv "
        "2403.03853). - `angle`: the angle between the two (The Unreasonable Ineffectiveness of the Deeper Layers, "
        "Gromov et al., 2024, arXiv 2403.17887; there of contiguous blocks and of the last token, here of all "
        "tokens). - `perplexity`: what the model predicts without them (Shortened LLaMA, Kim et al., 2024, arXiv "
        "2402.02834); slower, one pass over the text for each block. - `greedy`: as `perplexity`, but one goes at a "
        "time, and those that are left are judged anew (SLEB, Song et al., 2024, arXiv 2402.09025); as many times "
        "slower as blocks go.":
            "- `influence`：1 减去进入一层与离开一层的状态之间余弦的平均值（ShortGPT，Men 等，2024，arXiv 2403.03853）。\n- "
            "`angle`：二者之间的夹角（“The Unreasonable Ineffectiveness of the Deeper Layers”，Gromov 等，2024"
            "，arXiv 2403.17887；原文用于连续的层和最后一个词元，这里用于全部词元）。\n- `perplexity`：去掉这些层后模型的预测如何（Shortened "
            "LLaMA，Kim 等，2024，arXiv 2402.02834）；较慢，每层都要读一遍文本。\n- `greedy`：同 `perplexity`，但每次只去掉一层，"
            "其余各层重新评判（SLEB，Song 等，2024，arXiv 2402.09025）；去掉几层，就慢几倍。",
        "Contiguous blocks are judged as one run. Free ones are judged one by one on the whole model, but for "
        "`greedy`, so that blocks that each are dispensable may not be so together. A block that goes makes the "
        "model smaller and faster, on every device, by what it was of the whole; the damage is large and wants "
        "repair by training after it (distillation with student `current`).":
            "相邻的层作为一个整体评判。不要求相邻时，除 `greedy` 外，各层在完整模型上逐一评判，因此单独都可去掉的几层"
            "，一起去掉未必可行。每移除一层，模型就按该层所占的份额变小变快，在任何设备上都是如此；损伤很大，之后需要"
            "通过训练修复（学生为 `current` 的蒸馏）。",
        # prune/gradual
        "Gradual magnitude pruning (Zhu & Gupta, 2017, \"To prune, or not to prune\", arXiv 1710.01878). After step "
        "t the sparsity of each linear is":
            "渐进幅值剪枝（Zhu 和 Gupta，2017，“To prune, or not to prune”，arXiv 1710.01878）。第 t 步之后，每个线性层的稀"
            "疏度为",
        "s(t) = sparsity * (1 - (1 - t / T)³) every `every` steps until T = `ramp` of all steps":
            "    s(t) = sparsity * (1 - (1 - t / T)³)    每 `every` 步一次，直到 T = `ramp` × 总步数",
        "for early on there is much to spare and time to recover. What is left of the steps heals at the full "
        "sparsity. Trains on the text's true labels; put a repair or a distillation behind it to learn from the "
        "original. Weights that are zero stay zero. With a pattern N:M the whole pattern is cut at T, before that "
        "the same share without one.":
            "因为早期可剪的多，恢复的时间也多。其余步数在目标稀疏度下恢复。在文本的真实标签上训练；若要向原始模型学习，请在其后接修复或蒸馏。已为零的权重保持为零。使用 N:M 模式时"
            "，在 T 处一次剪成完整的模式，此前按同样的比例剪枝而不限位置。",
        "For high sparsities, which break a model that does not train on. The zeros stay dense in memory, and in the "
        "file unless `storage` is `bitmask`: memory and latency fall only with a kernel that uses them, CUDA's for "
        "2:4.":
            "适合高稀疏度：不继续训练的模型在那里会失效。零在内存中仍是稠密的，在文件中也是，除非 `storage` 为 "
            "`bitmask`：只有利用零的算子（CUDA 的 2:4 算子）才能降低内存和延迟。",
        # prune/l1
        "L1 regularisation before pruning, as in Han et al., 2015, \"Learning both Weights and Connections\", arXiv "
        "1506.02626, after Tibshirani's lasso (1996). In the first part of the steps the loss is":
            "剪枝前的 L1 正则化，如 Han 等，2015，“Learning both Weights and Connections”，arXiv 1506.02626，源自 "
            "Tibshirani 的 lasso（1996）。在前一部分步数中，损失为",
        "cross entropy + penalty * sum of |w| over the selected linears / number of linears":
            "    交叉熵 + penalty * 所选线性层的 Σ |w| / 线性层数",
        "whose gradient pulls each weight towards zero by the same amount, whatever its size. Then each linear loses "
        "the share `sparsity` of its smallest weights, or with a pattern N in each M, at once; the run says how "
        "large the largest of all these was. The rest of the steps trains without a price and with these weights at "
        "zero.":
            "其梯度以同样的力度把每个权重拉向零，与权重大小无关。然后让每个线性层一次失去比例为 `sparsity` 的最小权重"
            "，使用 N:M 模式时则每 M 个失去 N 个；运行会写明其中最大的权重有多大。其余步数不加代价继续训练，这些权重"
            "保持为零。",
        "Adam divides each gradient by its usual size: a weight that matters little to the loss feels the price "
        "most. The zeros stay dense in memory, and in the file unless `storage` is `bitmask`: memory and latency "
        "fall only with a kernel that uses them, CUDA's for 2:4.":
            "Adam 把每个梯度除以其通常大小：对损失影响小的权重最能感受到这一代价。零在内存中仍是稠密的，在文件中也是"
            "，除非 `storage` 为 `bitmask`：只有利用零的算子（CUDA 的 2:4 算子）才能降低内存和延迟。",
        # prune/low_rank
        "SVD-LLM (Wang et al., 2024, arXiv 2403.07378): with the Cholesky factor S of the inputs' second moments, X "
        "Xᵀ = S Sᵀ, the singular values of W S are what truncation costs: |WX - W'X|² is the sum of the squares that "
        "are dropped. So W' = U_r Σ_r V_rᵀ S⁻¹ is optimal, kept as `down` = √Σ_r V_rᵀ S⁻¹ (r, K) and `up` = U_r √Σ_r "
        "(N, r). Needs calibration text, no training. Smaller and faster on any device; costs more quality than "
        "quantization to the same size, and is best followed by distillation.":
            "SVD-LLM（Wang 等，2024，arXiv 2403.07378）：取输入二阶矩的 Cholesky 因子 S，X Xᵀ = S Sᵀ，则 W S 的奇异值就是截"
            "断的代价：|WX - W'X|² 等于被舍弃的奇异值的平方和。所以 W' = U_r Σ_r V_rᵀ S⁻¹ 是最优的，保存为 `down` = √Σ_r V_rᵀ S"
            "⁻¹ (r, K) 和 `up` = U_r √Σ_r (N, r)。需要校准文本，无需训练。在任何设备上都更小更快；与量化到同样大小相比质量损失更大，最好再接蒸馏。",
        "The ranks come from `ratio`, what remains of the selected linears' weights. `uniform`: the same share of "
        "each. `water-filling`: what a linear loses is measured against its output's energy, and the singular values "
        "that save most for each weight that they take are kept, wherever they are, until the size is reached; "
        "linears that would not become smaller stay as they are, and the log says which. On the demo model at ratio "
        "0.6 that is KL 0.003 against 0.29; with inputs as they are instead of scaled to length 1 it is 0.53, for "
        "the energy is then that of a few tokens with massive activations. The singular values are kept: with "
        "another ratio the text is read once, not twice.":
            "秩由 `ratio`（所选线性层权重的保留比例）决定。`uniform`：各线性层比例相同。`water-filling`：线性层的损失"
            "以其输出能量来衡量，优先保留单位权重所减少损失最多的奇异值，不论它们在哪里，直到达到目标大小；不会因此变"
            "小的线性层保持原样，日志会写明是哪些。在演示模型上，`ratio` 为 0.6 时 KL 为 0.003，而均等分配为 0.29；若"
            "输入保持原样而不缩放到长度 1，则为 0.53，因为此时的能量只是少数具有极大激活值的词元的能量。奇异值会保留"
            "：换一个比例时，文本只需读一遍，而不是两遍。",
        "The file is in a format of Maquette's own (`engine.low_rank`); `export dense` writes matrices that anybody "
        "loads. Zeros of earlier pruning steps are lost: a product has none.":
            "文件采用 Maquette 自己的格式（`engine.low_rank`）；`export dense` 写出谁都能加载的矩阵。先前剪枝步骤的零会丢失：乘积中没有零。",
        # prune/magnitude
        "Magnitude pruning (Han et al., 2015, arXiv 1506.02626), without retraining. Needs neither calibration nor "
        "training; the baseline that activation-aware pruning must beat. The zeros stay dense in memory, and in the "
        "file unless `storage` is `bitmask`: memory and latency fall only with a kernel that uses them, CUDA's for "
        "2:4.":
            "幅值剪枝（Han 等，2015，arXiv 1506.02626），不再训练。既不需要校准，也不需要训练；是激活感知剪枝必须超过"
            "的基线。零在内存中仍是稠密的，在文件中也是，除非 `storage` 为 `bitmask`：只有利用零的算子（CUDA 的 2:4 "
            "算子）才能降低内存和延迟。",
        "With the scope `global` one threshold holds for all selected linears (Blalock et al., 2020, \"What is the "
        "State of Neural Network Pruning?\", arXiv 2003.03033): linears of large weights lose less. It is exact and "
        "holds one block in memory: weights are counted by their bits. Of the weights that equal it, the first ones go.":
            "范围为 `global` 时，所有选中的线性层共用一个阈值（Blalock 等，2020，“What is the State of Neural Network "
            "Pruning?”，arXiv 2003.03033）：权重大的线性层损失较少。它是精确的，且内存中只有一层：权重按其二进制位计数。"
            "与阈值相等的权重中，排在前面的先剪。",
        # prune/sparsegpt
        "SparseGPT (Frantar & Alistarh, 2023, arXiv 2301.00774): minimises |XW - XQ|² for each linear, with the "
        "Hessian H = 2 X Xᵀ of calibration inputs, as GPTQ does, with zeros in the place of rounding. Zeros are "
        "chosen slice by slice of 128 columns, all rows together (of a large matrix those of 16 million weights), "
        "after the columns before have been made up for: those with the least saliency of optimal brain surgery. "
        "With a pattern N:M they are chosen when the first of M columns comes. Needs calibration text, no training. "
        "Better than Wanda, most of all where a pattern restricts the choice, for what is left moves.":
            "SparseGPT（Frantar 和 Alistarh，2023，arXiv 2301.00774）：与 GPTQ 一样，用校准输入的 Hessian 矩阵 H = 2 "
            "X Xᵀ 对每个线性层最小化 |XW - XQ|²，只是以置零代替舍入。每 128 列为一个切片，在前面的列得到补偿之后，所"
            "有行一起（大矩阵则每 1600 万个权重的行一起）选择置零位置：取“最优脑外科”显著性最小的权重。使用 N:M 模式"
            "时，在 M 列中的第一列到来时选择。需要校准文本，无需训练。优于 Wanda，在模式限制选择时尤其如此，因为留下"
            "的权重会移动。",
        "Columns are solved in their natural order, and tokens enter H as they are: on the demo model an early "
        "comparison gave KL 0.024 at half the weights and 0.065 at 2:4, against 0.029 and 0.072 with inputs scaled "
        "to length 1, which rounding prefers. The largest inputs first, which rounding prefers too, changed nothing "
        "there (0.023).":
            "各列按自然顺序求解，词元按原样计入 H：在演示模型上的早期比较中，剪去一半权重时 KL 为 0.024，2:4 时为 0.065；若把输入缩放到长度 1（舍入偏好这样），则为 "
            "0.029 和 0.072。先处理最大的输入（舍入也偏好这样）在那里没有影响（0.023）。",
        "Another ratio needs the calibration again: a Hessian for each linear is too large to keep, of 8 billion "
        "weights tens of GB.":
            "换一个比例需要重新校准：每个线性层的 Hessian 矩阵太大，无法保留，80 亿权重的模型需要几十 GB。",
        "Zeros that an earlier step made stay zeros and count. They all stay dense in memory, and in the file unless "
        "`storage` is `bitmask`: memory and latency fall only with a kernel that uses them, CUDA's for 2:4.":
            "先前步骤产生的零保持为零并计入其中。所有的零在内存中仍是稠密的，在文件中也是，除非 `storage` 为 "
            "`bitmask`：只有利用零的算子（CUDA 的 2:4 算子）才能降低内存和延迟。",
        # prune/vocabulary
        "For a model that will only see one language, domain or format: large vocabularies are a third of a small "
        "model, and most of their tokens are never seen. Unlike other pruning it costs nothing on that text: it is "
        "split into the very same tokens, and the logits of those that stay are what they were. Any other text can "
        "still be written, but in more and smaller tokens than the model learned it in, and that it reads badly: on "
        "such text bits per byte say what it cost. KL does not, for the original is given the same small tokens. The "
        "log says how the calibration text is split before and after.":
            "适合只会遇到一种语言、一个领域或一种格式的模型：大词表占小模型的三分之一，而其中多数词元从不出现。与其他剪枝不同，它在该类文本上没有任何代价：文本被切分成完全相同的词元，"
            "保留词元的 logits 也与原来相同。其他文本仍然可以写出，但所用的词元比模型学习时更多、更小，模型读起来很差：在这类文本上，代价要看每字节位数。KL 看不出来，因为原"
            "始模型得到的也是同样的小词元。日志会写明校准文本在处理前后如何切分。",
        "Kept besides: special and added tokens, single bytes, those that the config names, and all parts that merge "
        "into kept ones. For BPE (tokenizer.json) that is byte-level, or has byte fallback, as SentencePiece's has "
        "in Llama 2, Mistral and Gemma: there a character that the text does not use is written in bytes. Other "
        "tokenizers are refused. Reducing vocabularies of pretrained models to a corpus is described by Abdaoui et "
        "al., 2020, arXiv 2010.05609. Perplexities are comparable by bits per byte only.":
            "此外还保留：特殊词元和附加词元、单个字节、config 中指名的词元，以及能合并成保留词元的全部片段。适用于字节级的 BPE（tokenizer.json），或带字节回退"
            "的 BPE，如 Llama 2、Mistral 和 Gemma 中 SentencePiece 的词表：文本中没有的字符会以字节写出。其他分词器会被拒绝。把预训练模型的词"
            "表缩减到某一语料的做法见 Abdaoui 等，2020，arXiv 2010.05609。困惑度之间只能通过每字节位数比较。",
        # prune/wanda
        "Wanda (Sun et al., 2023, arXiv 2306.11695): score |w_nk| * |x_k|₂, compared within each output row. Needs "
        "calibration text, no training and no weight update. The zeros stay dense in memory, and in the file unless "
        "`storage` is `bitmask`: memory and latency fall only with a kernel that uses them, CUDA's for 2:4.":
            "Wanda（Sun 等，2023，arXiv 2306.11695）：得分为 |w_nk| * |x_k|₂，在每个输出行内比较。需要校准文本，无需"
            "训练，也不更新权重。零在内存中仍是稠密的，在文件中也是，除非 `storage` 为 `bitmask`：只有利用零的算子（"
            "CUDA 的 2:4 算子）才能降低内存和延迟。",
        "As in the paper's code a block is measured with what the pruned blocks before it give. With `inputs: "
        "original` all are measured in the model as it comes, once: the norms are kept, and another sparsity, "
        "pattern or choice of linears on the same text needs no calibration.":
            "与论文代码一样，每一层用前面已剪枝各层的输出来测量。设为 `inputs: original` 时，全部在原样的模型上一次测完：范数会保留，在同一文本上换用其他稀疏度、模"
            "式或线性层选择都无需再校准。",
        # prune/width
        "Importance by activation (Minitron, Muralidharan et al., 2024, arXiv 2407.14679): L2 norms over calibration "
        "text of what neurons and heads give and of what norms leave in a channel. Or by first-order Taylor "
        "(Molchanov et al., 2019, arXiv 1906.10771; LLM-Pruner, Ma et al., 2023, arXiv 2305.11627): |sum of w dL/dw| "
        "over all weights of a structure, which needs gradients, and so memory for the whole model in float32 twice.":
            "按激活值的重要性（Minitron，Muralidharan 等，2024，arXiv 2407.14679）：在校准文本上，神经元和注意力头的输出的 L2 范数，以及归"
            "一化在一个通道中的输出的 L2 范数。或用一阶泰勒展开（Molchanov 等，2019，arXiv 1906.10771；LLM-Pruner，Ma 等，2023，"
            "arXiv 2305.11627）：对一个结构的全部权重取 |Σ w dL/dw|，它需要梯度，因此内存中要有两份 float32 的完整模型。",
        "Heads go by groups that share a key-value head (where all share one: single query heads). As many go in "
        "each block, for a config has one number for all. The result is a plain model of its architecture, smaller "
        "and faster everywhere; the damage wants repair by training after it (distillation with student `current`). "
        "Channels hurt most before training; of the demo model half of them come back with it, and half of the heads do "
        "not.":
            "注意力头按共用一个键值头的组移除（全部共用一个时：按单个查询头）。各层移除的数量相同，因为 config 对所有层只有一个数。结果是其架构的普通模型，处处更小更快；损伤需"
            "要之后通过训练修复（学生为 `current` 的蒸馏）。训练之前，移除通道的损伤最大；在演示模型上，移除一半通道可通过训练恢复，移除一半注意力头则不能。",
        # distill/features
        "TinyBERT (Jiao et al., 2019, arXiv 1909.10351). Each student block stands for a block of the teacher, "
        "evenly spread, the last for the last. The loss of a batch is":
            "TinyBERT（Jiao 等，2019，arXiv 1909.10351）。学生的每一层对应教师的一层，均匀分布，最后一层对应最后一层。一个批次的损失为",
        "prediction + hidden_weight * mean of |h_student W - h_teacher|² / |h_teacher|² + attention_weight * mean of "
        "KL":
            "    预测项 + hidden_weight * |h_student W - h_teacher|² / |h_teacher|² 的平均值 + "
            "attention_weight * KL 的平均值",
        "over the sequences and the blocks (and the embeddings, for hidden states). The loss on predictions is that "
        "of `distill/logits`, with more `teachers` from the mean of their probabilities; hidden states and maps are "
        "the original's alone. W is a linear map that is learned beside the student and thrown away afterwards; "
        "where the widths agree there is none. Hidden states of a sequence count relative to the teacher's size, so "
        "that a weight means the same in every family. Attention maps are compared as probabilities, KL(teacher || "
        "student), averaged over the heads where their numbers differ; TinyBERT compared the logits before the "
        "softmax, which `transformers` does not give. Maps need the plain (eager) attention, slower and of memory T² "
        "a head: only while training, and only with an attention_weight above 0.":
            "平均值取自各序列和各层（隐藏状态还包括词嵌入）。预测项的损失与 `distill/logits` 相同，指定更多 "
            "`teachers` 时，以它们概率的平均为准；隐藏状态和注意力图只取自原始模型。W 是与学生一起学习、之后丢弃的线"
            "性映射；宽度一致时不用。每个序列的隐藏状态相对教师的大小计算，使同一权重在每个模型系列中含义相同。注意力"
            "图以概率比较，即 `KL(teacher || student)`，头数不同时对各头取平均；TinyBERT 比较的是 softmax 之前的 "
            "logits，`transformers` 不提供。注意力图需要普通（eager）注意力，较慢，每个头占用 T² 的内存：只在训练时，"
            "且仅当 `attention_weight` 大于 0 时。",
        "Good for students that start at random, and early in a training. All teachers are in memory all the while. "
        "Needs training text.":
            "适合从随机开始的学生，以及训练初期。所有教师始终在内存中。需要训练文本。",
        # distill/logits
        "Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531). With z the teacher's and y the student's "
        "logits, the loss of each token is":
            "知识蒸馏（Hinton 等，2015，arXiv 1503.02531）。以 z 表示教师的 logits、y 表示学生的 logits，每个词元的损失为",
        "T² keeps the gradient's size when T changes. `divergence` takes reverse KL (MiniLLM, Gu et al., 2023, arXiv "
        "2306.08543) or the Jensen-Shannon divergence (GKD, Agarwal et al., 2023, arXiv 2306.13649) instead. The "
        "student is every k-th block of the model (DistilBERT's way, the best start), a new network of a given size, "
        "a checkpoint with the same tokenizer, or the model as earlier steps left it, to repair what pruning broke.":
            "T² 使梯度大小不随 T 改变。`divergence` 可改用反向 KL（MiniLLM，Gu 等，2023，arXiv 2306.08543）或 "
            "Jensen-Shannon 散度（GKD，Agarwal 等，2023，arXiv 2306.13649）。学生可以是模型的每 k 层取一层（DistilBERT 的做"
            "法，最好的起点）、指定尺寸的新网络、使用同一分词器的检查点，或前面步骤留下的模型本身，以修复剪枝造成的损伤。",
        "The teacher is the original model of the recipe; with more `teachers` it is the mean of their "
        "probabilities. It is asked once: its `top_k` answers and the mass of the rest go to disk, and it is not in "
        "memory while the student trains; runs on the same text find them there. With `live` it stays in memory and "
        "all its probabilities count.":
            "教师是配方的原始模型；指定更多 `teachers` 时，取它们概率的平均。教师只问一次：它的 `top_k` 个答案和其余概率之和写入磁盘，学生训练时它不在内存中；使用"
            "同一文本的运行会在那里找到它们。设为 `live` 时它留在内存中，全部概率都计入。",
        "Where the student is far smaller, `assistants` (Mirzadeh et al., 2019, arXiv 1902.03393) of sizes in "
        "between are trained first, each by the one before it, and the last one teaches the student. Beside a student "
        "that is there already, pruned by earlier steps or a checkpoint, they are cut from the original: some of its "
        "blocks, evenly spread, and the neurons, heads and channels that matter most by activation. Needs training "
        "text.":
            "学生小得多时，先训练若干中间尺寸的 `assistants`（Mirzadeh 等，2019，arXiv 1902.03393），每个由前一个教，最后一个来教学生。学生已经"
            "存在时（由前面步骤剪枝而来，或是检查点），助教从原始模型裁出：均匀分布的若干层，以及按激活值最重要的神经元、注意力头和通道。需要训练文本。",
        "With several GPUs a process on each takes its share of every batch and holds its shard of the student "
        "(FSDP).":
            "有多块 GPU 时，每块上的一个进程处理每个批次的一份，并保存学生的一个分片（FSDP）。",
        # distill/on_policy
        "Generalised knowledge distillation (GKD, Agarwal et al., 2023, arXiv 2306.13649). In a share of the batches "
        "the student goes on from the beginning of a document in each of the text's rows (of the row, where none "
        "begins in it) with tokens that it samples; the teacher, with more `teachers` the mean of their "
        "probabilities, says what it would have expected there, and the divergence counts on the tokens that were "
        "written, up to the first end of text. The other batches are the text, as in logit distillation. Nothing is "
        "learned through the sampling itself.":
            "广义知识蒸馏（GKD，Agarwal 等，2023，arXiv 2306.13649）。一部分批次以文本各行中某个文档的开头为起点（行"
            "中没有文档开始时，以该行的开头为起点），由学生采样续写；教师给出它在那里会预期什么（指定更多 `teachers` "
            "时，取它们概率的平均），散度只计所写的词元，直到第一个文本结束符。其余批次就是文本，如同 Logit 蒸馏。采"
            "样本身不参与学习。",
        "Reverse KL and Jensen-Shannon make a small student keep to what it can do well. Good for a student that "
        "writes already (healed or pruned, not one at random); slow, since sequences are written token by token. "
        "What is sampled after a row follows from the seed, the step and the row alone, so a resumed run writes it "
        "again, and each of several processes writes after its own rows. All teachers are in memory all the while. "
        "Needs training text.":
            "反向 KL 和 Jensen-Shannon 散度让较小的学生模型专注于它能做好的事。适合已经会写的学生（修复过或剪枝过的，"
            "而不是随机初始化的）；较慢，因为序列是逐词元写出的。每行之后的样本只由种子、步数和该行决定，所以继续的运"
            "行会写出同样的样本，多个进程也各写自己的行。所有教师始终在内存中。需要训练文本。",
        # distill/repair
        "Logit distillation of the model as it is, from the original (with more `teachers` from the mean of their "
        "probabilities), with three choices of what may change:":
            "对现有模型做 Logit 蒸馏，教师是原始模型（指定更多 `teachers` 时，取它们概率的平均）；可以改变什么，有三"
            "种选择：",
        "- `all`: every weight; zeros of pruned linears stay zero. - `lora`: for each linear of the blocks a product "
        "of two thin matrices is learned beside it, W + B A (LoRA, Hu et al., 2021, arXiv 2106.09685), and merged at "
        "the end, masked where zeros must stay. - `norms and scales`: the weights of norms, all biases but the head's, "
        "and of quantized linears in the blocks the scales.":
            "- `all`：全部权重；已剪枝线性层的零保持为零。\n- `lora`：在各层的每个线性层旁学习两个瘦矩阵的乘积，W + B A（LoRA，Hu 等，2021，"
            "arXiv 2106.09685），最后合并，须保持为零之处加掩码。\n- `norms and scales`：归一化的权重、除输出头外的全部偏置，以及各层中已量化线性层的缩放"
            "系数。",
        "`all` heals most and holds an optimizer state for everything; `lora` trains far less, of 4,096 by 4,096 "
        "weights a 256th at rank 8. All three may follow quantization, but not a library's "
        "(`quantize/bitsandbytes`), and what comes out has the same grids but for their scales: `norms and scales` "
        "never touches an integer code, w = (code - zero) * scale, where the gradient goes to the scale. `all` and "
        "`lora` are quantization-aware training (as LLM-QAT, Liu et al., 2023, arXiv 2305.17888): the quantized "
        "linears of the blocks learn weights that are rounded to the grid for every product, and its scales; head "
        "and embeddings that are quantized stay as they are. Rounding, also of inputs, is passed over by the "
        "gradient (straight-through, Bengio et al., 2013, arXiv 1308.3432).":
            "`all` 恢复得最多，并为全部权重保存优化器状态；`lora` 训练的少得多，秩为 8 时，对 4,096 × 4,096 的权重为 "
            "1/256。三者都可以放在量化之后（第三方库的量化 `quantize/bitsandbytes` 除外），结果除缩放系数外仍在同样的"
            "网格上：`norms and scales` 从不改动整数码，`w = (code - zero) * scale`，梯度传给缩放系数。`all` 和 "
            "`lora` 是量化感知训练（如 LLM-QAT，Liu 等，2023，arXiv 2305.17888）：各层中已量化的线性层学习浮点权重，"
            "每次相乘前舍入到网格上，并学习网格的缩放系数；已量化的输出头和嵌入保持不变。舍入（包括输入的舍入）被梯度"
            "直接穿过（直通估计，Bengio 等，2013，arXiv 1308.3432）。",
        "The adapters are written here: `peft` would be one more package for these few lines. Needs training text.":
            "适配器在这里自行实现：为这几行代码引入 `peft` 不值得多一个软件包。需要训练文本。",
        # distill/sequence
        "Sequence-level distillation (Kim & Rush, 2016, arXiv 1606.07947). The beginning of a document in each of "
        "the text's rows (of the row, where none begins in it) is a prompt; the teacher goes on from it, greedily or "
        "sampled, with more `teachers` by the mean of their probabilities, and the student learns its tokens as "
        "labels, and the prompts' too unless `learn_prompts` is off. What the teacher wrote has fewer surprises than "
        "what people wrote, and a small student can learn more of it. The sequences go to disk with the fingerprint "
        "of the teacher and of the prompts: a killed run goes on with them, later runs find them, and the teacher is "
        "not in memory while the student trains.":
            "序列级蒸馏（Kim 和 Rush，2016，arXiv 1606.07947）。以文本各行中某个文档的开头（行中没有文档开始时，以该"
            "行的开头）作为提示词；教师以贪心或采样方式续写，指定更多 `teachers` 时按它们概率的平均，学生把这些词元作"
            "为标签来学习，提示词的词元也学习，除非关闭 `learn_prompts`。教师写的内容比人写的意外更少，较小的学生能从"
            "中学到更多。序列连同教师和提示词的指纹一起存入磁盘：中途被终止的运行会接着用，以后的运行也能找到，学生训"
            "练时教师不在内存中。",
        "Only what the teacher chose counts, not how sure it was: follow or combine with logit distillation where "
        "that matters.":
            "只计教师选了什么，不计它有多确定：若这一点重要，请在其后接 Logit 蒸馏，或与之结合。",
    }
)
# fmt: on
