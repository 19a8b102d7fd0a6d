"""What the engine says in sentences, in Simplified Chinese: errors, notes and the lines of a log, by their template.

The engine writes English, also into its store; `ui.messages` recognises a line by the text around its values. What
stands in braces is carried over: `{said...}` is looked up in turn, `{method}` and `{linear}` must look like one.
Terms as in `ui.chinese`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# fmt: off
MESSAGES: Mapping[str, str] = MappingProxyType(
    {
        # names
        "Unknown {said} '{name}'. Did you mean {said_near}? Available: {known}.":
            "未知的{said}“{name}”。您是不是指 {said_near}？可用：{known}。",
        "Unknown {said} '{name}'. Did you mean {said_near}?": "未知的{said}“{name}”。您是不是指 {said_near}？",
        "Unknown {said} '{name}'. Available: {known}.": "未知的{said}“{name}”。可用：{known}。",
        "Unknown {said} '{name}'.": "未知的{said}“{name}”。",
        # recipes
        "The recipe has {count} characters; the limit is {limit}.": "配方有 {count} 个字符，上限为 {limit}。",
        "A recipe may not use YAML aliases (`*name`): write the value out.": "配方不能使用 YAML 别名（`*name`）：请直接写出值。",
        "The recipe is not valid YAML: {said} in line {line}, column {column}.":
            "配方不是有效的 YAML：第 {line} 行第 {column} 列：{said}。",
        "The recipe has {key} twice in one place. Keep one.": "配方中同一处有两个 {key}。请只保留一个。",
        "Divergence is that of two models: name the original with --baseline.": "散度需要两个模型：请用 --baseline 指定原始模型。",
        "The recipe is not valid YAML: {said}.": "配方不是有效的 YAML：{said}。",
        "The recipe is not valid YAML: {error}.": "配方不是有效的 YAML：{error}。",
        "The recipe must be a mapping such as `model: demo`, with keys {keys}.":
            "配方必须是 `model: demo` 这样的映射，键为 {keys}。",
        "steps must be a list such as `- quantize/rtn: {{bits: 4}}`.":
            "steps 必须是 `- quantize/rtn: {{bits: 4}}` 这样的列表。",
        "A step must be `method: {{settings}}`, got {got}.": "每一步必须写成 `method: {{settings}}`，收到的是 {got}。",
        "A step names one method, got {got}; indent the settings or put them in braces.":
            "每一步只能写一种方法，收到的是 {got}；请将设置缩进或放在花括号中。",
        "The settings of {name} must be a mapping, got {got}.": "{name} 的设置必须是映射，收到的是 {got}。",
        "{method}: {field}: {said}, got {got}.": "{method}：{field}：{said}，收到的是 {got}。",
        "{method}: {field}: {said}.": "{method}：{field}：{said}。",
        "{field}: {said}, got {got}.": "{field}：{said}，收到的是 {got}。",
        "{field}: {said}.": "{field}：{said}。",
        "{method} cannot follow {earlier}. Put {last} last, once.": "{method} 不能排在 {earlier} 之后。请把 {last} 放在最后，且只用一次。",
        "{method} cannot follow {earlier}, whose weights are a library's. Leave one out.":
            "{method} 不能排在 {earlier} 之后：后者的权重属于第三方库的格式。请去掉其中一个。",
        "{method} cannot follow {earlier}, whose weights are a library's. Put {last} last.":
            "{method} 不能排在 {earlier} 之后：后者的权重属于第三方库的格式。请把 {last} 放在最后。",
        "{method} cannot follow {earlier}: it would change weights whose integer codes are already fixed. "
        "Put quantization last; distill/repair may follow it.":
            "{method} 不能排在 {earlier} 之后：它会改变整数码已经确定的权重。"
            "请把量化放在最后；其后可以接 distill/repair。",
        # folders and files of models
        "There is no model folder {name}. Give `demo` or the path of a folder.":
            "没有模型文件夹 {name}。请填写 `demo` 或文件夹路径。",
        "The model is empty or holds a NUL character. Give `demo` or the path of a folder.":
            "模型为空或含有 NUL 字符。请填写 `demo` 或文件夹路径。",
        "There is no calibration file {name}. Give `demo` or a text or JSONL file.":
            "没有校准文件 {name}。请填写 `demo`，或文本文件、JSONL 文件。",
        "There is no training text {name}. Give `demo` or a text or JSONL file.":
            "没有训练文本 {name}。请填写 `demo`，或文本文件、JSONL 文件。",
        "There is no text {name}. Give `demo` or a text or JSONL file.":
            "没有文本 {name}。请填写 `demo`，或文本文件、JSONL 文件。",
        "{name} is already quantized. Start from the original model.": "{name} 已经量化过。请从原始模型开始。",
        "{method}: sequence_length {length} is more than the {longest} tokens that the model reads. Use {number} or less.":
            "{method}：sequence_length {length} 超过该模型能读取的 {longest} 个词元。请使用 {number} 或更小的值。",
        "The model reads {longest} tokens, and measuring takes up to {needed}. Measure its size alone.":
            "该模型只能读取 {longest} 个词元，而测量最多需要 {needed} 个。请只测量大小。",
        "{name} is quantized; its codes cannot be trained. Name the original.": "{name} 已量化，其编码无法训练。请指定原始模型。",
        "{name} is truncated or not a safetensors file. Download it again.": "{name} 不完整，或不是 safetensors 文件。请重新下载。",
        "{name} holds only an adapter. Merge it into its base model first.": "{name} 只有适配器。请先把它合并到基座模型。",
        "{name} has no config.json: it is not a model folder.": "{name} 没有 config.json：它不是模型文件夹。",
        "{name}: model type {kind} is unknown to the installed transformers.": "{name}：已安装的 transformers 不认识模型类型 {kind}。",
        "{name}: a {kind} model is not a causal language model.": "{name}：{kind} 模型不是因果语言模型。",
        "{name}: transformers keeps no keys and values of {kind} models, so that each new token would read the whole "
        "text again. Choose a model of another type.":
            "{name}：transformers 不为 {kind} 模型保留键和值，每个新词元都要重读全文。请选择其他类型的模型。",
        "{name} is a {kind} model, which wraps a language model together with other media; "
        "Maquette compresses language models alone. Choose a text-only checkpoint of it.":
            "{name} 是 {kind} 模型，把语言模型与其他媒体包装在一起；Maquette 只压缩单独的语言模型。请选择其纯文本的检查点。",
        "{name}: config.json says {key} = {value}; that cannot be right.": "{name}：config.json 中 {key} = {value}，这不可能正确。",
        "{name}: {heads} attention heads do not divide a hidden size of {hidden}.": "{name}：{heads} 个注意力头不能整除隐藏维度 {hidden}。",
        "{name}: the bitmask of {linear} is incomplete. Download it again.": "{name}：{linear} 的位图不完整。请重新下载。",
        "{name}: the bitmask of {linear} does not fit {rows} x {columns}.": "{name}：{linear} 的位图与 {rows} x {columns} 不符。",
        "{name} has {embeddings} embeddings, and its tokenizer gives the token {token}: the two are not of one model. "
        "Copy the tokenizer from the model it was made of.":
            "{name} 有 {embeddings} 个词嵌入，而其分词器给出了词元 {token}：二者不属于同一模型。请从其来源模型复制分词器。",
        "{name} has {size} MiB; at most {limit} are read. Download it again.": "{name} 有 {size} MiB；最多读取 {limit} MiB。请重新下载。",
        "{name} is not JSON: it is damaged. Download it again.": "{name} 不是 JSON：文件已损坏。请重新下载。",
        "{name} is not a JSON object.": "{name} 不是 JSON 对象。",
        "{name}: {shared} heads of keys and values do not divide {heads} attention heads.":
            "{name}：{shared} 个键值头不能整除 {heads} 个注意力头。",
        "{name} has no tokenizer: copy tokenizer.json from the model it was made of.":
            "{name} 没有分词器：请从其来源模型复制 tokenizer.json。",
        "{name}: config.json says {key} = {value}; no such activation is known here.":
            "{name}：config.json 中 {key} = {value}；这里不认识这样的激活函数。",
        "{name}: config.json says rope_type = {value}; no such positions are known here.":
            "{name}：config.json 中 rope_type = {value}；这里不认识这样的位置编码。",
        "{name}: model.safetensors.index.json is damaged. Download it again.":
            "{name}：model.safetensors.index.json 已损坏。请重新下载。",
        "{name}: model.safetensors.index.json names no file. Download it again.":
            "{name}：model.safetensors.index.json 没有列出文件。请重新下载。",
        "{name} has pickled weights only; they can run code. Convert them to safetensors.":
            "{name} 只有 pickle 格式的权重，它们可能执行代码。请转换为 safetensors。",
        "{name} has no model.safetensors.": "{name} 没有 model.safetensors。",
        "{name}: the index names {part}, which is not a file of this folder.": "{name}：索引中的 {part} 不是该文件夹里的文件。",
        "config.json says {key} = {value}; it must name linears with their ranks.": "config.json 中 {key} = {value}；它必须列出线性层及其秩。",
        "config.json says {key} = {value} for {linear}, which cannot be.": "config.json 中 {linear} 的 {key} = {value}，这不可能。",
        "config.json says {key}: what a block computes depends on its number, so none can go.":
            "config.json 中有 {key}：每层的计算取决于其序号，所以不能移除任何层。",
        "In float16 the numbers of this model become too large. Choose bfloat16 or float32.":
            "在 float16 中，该模型的数值会溢出。请选择 bfloat16 或 float32。",
        "What the model computes is no number any more. Choose gentler settings.":
            "模型的计算结果已不是有效数值。请选择更温和的设置。",
        "The blocks of a {kind} model have different parts, and its config cannot say which of them are left: none can go.":
            "{kind} 模型各层的组成不同，而其配置无法说明保留了哪些层：不能移除任何层。",
        "config.json does not say how {linear} is packed.": "config.json 没有说明 {linear} 如何打包。",
        "{name}: config.json says {key} = {value}; no such KV cache is known.": "{name}：config.json 中 {key} = {value}；没有这样的 KV 缓存。",
        "{name}: the weights do not fit the config ({said}: {example}).": "{name}：权重与配置不符（{said}：{example}）。",
        "{name}: the weights have other shapes than the config says.": "{name}：权重的形状与配置不符。",
        "{name}: {linear} holds NaN or infinite values; the checkpoint is damaged.": "{name}：{linear} 含有 NaN 或无穷大；检查点已损坏。",
        "{name}: {linear} has the shape {got}, the config says {wanted}.": "{name}：{linear} 的形状为 {got}，配置为 {wanted}。",
        "{name}: {said}; save or download the model again.": "{name}：{said}；请重新保存或下载模型。",
        "{name}: its weights are packed, but config.json does not say how.": "{name}：权重已打包，但 config.json 没有说明方式。",
        "{name}: config.json chooses modules by {pattern}, which is no pattern or takes too long to match. "
        "Choose another model.":
            "{name}：config.json 用 {pattern} 选择模块，它不是模式或匹配耗时过长。请选择其他模型。",
        "{name}: config.json gives {linear} no integer scheme that we can read.": "{name}：config.json 没有给出 {linear} 可读取的整数方案。",
        "{name}: config.json quantizes the inputs of {linear} as we cannot read.": "{name}：config.json 对 {linear} 输入的量化方式无法读取。",
        "{name}: tokenizer.json is damaged. Download it again.": "{name}：tokenizer.json 已损坏。请重新下载。",
        "{name} has no tokenizer.json that can be read; tokens stay as they are.": "{name} 没有可读取的 tokenizer.json；词元保持不变。",
        "{name} has another tokenizer: {said}. Probabilities of different tokens cannot be compared; "
        "use a checkpoint of the same family.":
            "{name} 的分词器不同：{said}。不同词元的概率无法比较；请使用同系列的检查点。",
        "{name} has no list of {count} blocks; this family is not supported yet.": "{name} 没有 {count} 层的列表；尚不支持该系列。",
        "{name} is a mixture of {count} experts of the type {kind}; Maquette can compress those of {known}.":
            "{name} 是 {kind} 类型的混合专家模型（{count} 个专家）；Maquette 能压缩的有 {known}。",
        "{name}: files differ from the manifest: {files}.": "{name}：文件与清单不符：{files}。",
        "{name} has no readable {file}.": "{name} 没有可读取的 {file}。",
        "{name}: {file} is not what the manifest says.": "{name}：{file} 与清单不符。",
        # memory and devices
        "The run needs {needed} GiB, {free} are free. Close other programs, or choose a smaller model.":
            "该运行需要 {needed} GiB，可用 {free} GiB。请关闭其他程序，或选择较小的模型。",
        "The run needs {needed} GiB, {free} are free: {said_way}.": "该运行需要 {needed} GiB，可用 {free} GiB：{said_way}。",
        "The run needs {needed} GiB, {free} are free: {said_way}. That is too much, too. Close other programs, "
        "or choose a smaller model.":
            "该运行需要 {needed} GiB，可用 {free} GiB：{said_way}，仍然过多。请关闭其他程序，或选择较小的模型。",
        "One block took {needed} GiB, {free} were free. Use fewer or shorter calibration sequences.":
            "一层用了 {needed} GiB，可用 {free} GiB。请使用更少或更短的校准序列。",
        "There is no CUDA device here. Choose the device `cpu` or `auto`.": "本机没有 CUDA 设备。请选择设备 `cpu` 或 `auto`。",
        "The export needs {needed} GiB of disk, {free} are free.": "导出需要 {needed} GiB 磁盘空间，可用 {free} GiB。",
        "The teacher's answers need {needed} GiB on disk, {free} are free. Use fewer steps, a smaller top_k, "
        "or teacher_logits `live`.":
            "教师的答案需要 {needed} GiB 磁盘空间，可用 {free} GiB。请减少步数、减小 top_k，或使用 teacher_logits `live`。",
        "Out of memory: the run held {held} GiB, its budget is {budget} GiB. {said}":
            "内存不足：该运行占用 {held} GiB，其预算为 {budget} GiB。{said}",
        "Out of memory. Use fewer calibration samples, a smaller batch or a smaller model, or free some memory.":
            "内存不足。请减少校准样本、减小批大小或换用较小的模型，或释放一些内存。",
        "The disk is full. Delete old runs or choose another folder with MAQUETTE_HOME, then try again.":
            "磁盘已满。请删除旧的运行，或用 MAQUETTE_HOME 选择其他文件夹，然后重试。",
        "The data folder cannot be written. Choose another with MAQUETTE_HOME, or let this user write to it.":
            "数据文件夹无法写入。请用 MAQUETTE_HOME 选择其他文件夹，或允许当前用户写入。",
        "Too many files are open. Raise the limit (ulimit -n) or end other programs, then try again.":
            "打开的文件过多。请提高上限（`ulimit -n`）或结束其他程序，然后重试。",
        "The file {name} could not be used: {said}. The log has the details.": "文件 {name} 无法使用：{said}。详情见日志。",
        "The file {name} could not be used: {error}. The log has the details.": "文件 {name} 无法使用：{error}。详情见日志。",
        "The file could not be used: {said}. The log has the details.": "文件无法使用：{said}。详情见日志。",
        "The file could not be used: {error}. The log has the details.": "文件无法使用：{error}。详情见日志。",
        "{variable} is {asked}. Use a number from 1 to 1024, or leave it out.": "{variable} 为 {asked}。请填 1 到 1024 之间的数，或不填。",
        "{variable} is {asked}, and torch sees {gpus} GPU. Use {most} or less.": "{variable} 为 {asked}，而 torch 只看到 {gpus} 个 GPU。请用 {most} 或更少。",
        "{variable} is {asked}, and torch sees {gpus} GPUs. Use {most} or less.": "{variable} 为 {asked}，而 torch 只看到 {gpus} 个 GPU。请用 {most} 或更少。",
        # which linears
        "{method}: {chosen} of {all} linears of experts are selected; `transformers` reads a mixture's packed linears "
        "only where all of these are packed, too. Select them all.":
            "{method}：{all} 个专家线性层中选中了 {chosen} 个；只有全部专家也都打包时，`transformers` 才能读取混合专家模型的打包线性层。请全部选中。",
        "{method}: {said} Choose other settings, or ignore `*.experts.*`.": "{method}：{said}请选择其他设置，或忽略 `*.experts.*`。",
        "{method}: {said} Choose other settings, or use another method.": "{method}：{said}请选择其他设置，或改用其他方法。",
        "{method}: no linear is left by targets {targets} and ignore {ignore}. Names are as in {linear}.":
            "{method}：目标 {targets} 和忽略 {ignore} 之后没有剩下线性层。名称形如 {linear}。",
        "{method}: {pattern} of {setting} fits no linear that is chosen. Names are as in {linear}.":
            "{method}：{setting} 中的 {pattern} 不匹配任何选中的线性层。名称形如 {linear}。",
        "Packed linears of {kind} are in a format of Maquette's own, which stock `transformers` refuses. "
        "The Runs tab or `export --format dense` writes a folder that it loads, in 16 bit.":
            "打包后的 {kind} 线性层采用 Maquette 自己的格式，标准 `transformers` 会拒绝加载。“运行”页或 `export --format dense` 会写出它能加载的 16 位文件夹。",
        "Packed linears of {kind} are in a format of Maquette's own, which stock `transformers` refuses. "
        "No export holds rounded inputs: for other programs use a weight-only method.":
            "打包后的 {kind} 线性层采用 Maquette 自己的格式，标准 `transformers` 会拒绝加载。任何导出格式都无法表示输入被舍入：若要供其他程序使用，请选择只量化权重的方法。",
        "{patterns} of ignore fits no linear of the blocks, so it leaves none alone.":
            "忽略中的 {patterns} 不匹配各层的任何线性层，因此没有线性层会保持不变。",
        "{pattern} takes too long to match. Write it without repeats inside repeats.":
            "{pattern} 的匹配耗时过长。请不要在重复中嵌套重复。",
        "no linear is left by targets and ignore. Names are as in {linear}.": "按目标和忽略没有剩下线性层。名称形如 {linear}。",
        "{method}: Gemma 3 has embeddings of its own kind, which can only stay as they are.":
            "{method}：Gemma 3 的词嵌入是特殊类型，只能保持不变。",
        "transformers cannot load Falcon's own linears in bitsandbytes' files. Use quantize/rtn.":
            "transformers 无法加载 bitsandbytes 文件中 Falcon 自己的线性层。请使用 quantize/rtn。",
        "{later} cannot follow {earlier}: {said}": "{later} 不能跟在 {earlier} 之后：{said}",
        "the library's files hold no linears of two. Use another quantization, or leave one out.":
            "该库的文件格式不支持拆成两个的线性层。请改用其他量化方法，或去掉其中一步。",
        "the library's files hold no bitmasks. Use storage dense.": "该库的文件格式不支持位掩码。请使用 storage dense。",
        "it leaves two linears for one. Put it last of these.": "它把一个线性层变成两个。请把它放在这些步骤的最后。",
        "ranks are multiples of {multiple}, which groups of {size} do not divide. Use multiple {wanted}.":
            "秩是 {multiple} 的倍数，大小为 {size} 的组无法整除。请使用 multiple {wanted}。",
        "the original has other tokens than the model then, and can teach it nothing. Put it before.":
            "那时原始模型的词元与该模型不同，无法教它。请把它放在前面。",
        "This model needs {needed} GiB to write, and {free} GiB are free. Wait until a run has ended, or compare a "
        "smaller one.":
            "该模型生成文本需要 {needed} GiB，而空闲内存为 {free} GiB。请等待某个运行结束，或比较更小的模型。",
        "{method}: the head of {name} is its embeddings, which stay as they are here. Turn head off.":
            "{method}：{name} 的输出头就是其词嵌入，而此处词嵌入保持不变。请关闭输出头选项。",
        "{method}: the head of {name} is its embeddings; quantized apart, they would be larger. "
        "Choose both, head and embeddings, or neither.":
            "{method}：{name} 的输出头就是词嵌入；分开量化反而更大。请同时选择输出头和词嵌入，或都不选。",
        "{method}: {said}": "{method}：{said}",
        # settings of methods against the model
        "keep_every {every} leaves no block of {count}. Use {most} or less.": "keep_every 为 {every} 时 {count} 层中一层也不剩。请用 {most} 或更小。",
        "hidden_size {size} is not a multiple of the head size {head} of this model.": "hidden_size {size} 不是该模型头维度 {head} 的倍数。",
        "prompt_tokens {count} leave no token of {length} to write": "prompt_tokens 为 {count} 时 {length} 个词元中没有留下可写的",
        "greedy lets blocks go one at a time, wherever they are. Use perplexity with contiguous":
            "greedy 每次去掉任意一层。若要求相邻，请用 perplexity",
        "write a factor from 0 to 1 and the steps before it, such as `0.1 after 100`":
            "请写 0 到 1 之间的系数及其之前的步数，例如 `0.1 after 100`",
        "steps must rise from factor to factor, and nothing comes after the factor 0":
            "各系数的步数必须递增，且系数 0 之后不能再有系数",
        "no step comes after step {step}: steps is {count}": "第 {step} 步之后没有步：steps 为 {count}",
        "the training cannot end after step {step}: its last weights go after step {last}":
            "训练不能在第 {step} 步之后结束：最后一批权重在第 {last} 步之后才被剪去",
        "{name} cannot be taken apart for its features. Use distill/logits.": "无法拆出 {name} 的特征。请使用 distill/logits。",
        "all {count} blocks would be removed. Keep one at least: count {most} or less.": "全部 {count} 层都会被移除。请至少保留一层：count 设为 {most} 或更小。",
        "a model of one block can lose none.": "只有一层的模型不能移除任何层。",
        "a rank of {multiple} makes {linear} no smaller. Use a smaller multiple, or leave it out with `ignore`.":
            "秩为 {multiple} 不会使 {linear} 变小。请用更小的 multiple，或用 `ignore` 把它排除。",
        "a share of {share} of {count} blocks is none. Set count, or a larger share.": "{count} 层的 {share} 不足一层。请设置 count，或用更大的比例。",
        "ratio {ratio} leaves no rank that is a multiple of {multiple} for each linear.": "ratio 为 {ratio} 时，没有适合每个线性层的 {multiple} 的倍数的秩。",
        "ratio {ratio} leaves {linear} no rank that is a multiple of {multiple}. Use a ratio from {least} on, or a smaller multiple.":
            "ratio 为 {ratio} 时，{linear} 没有 {multiple} 的倍数的秩。请用 {least} 以上的 ratio，或更小的 multiple。",
        "The tokenizer has the token {token}, the model has no row for it. Use another.": "分词器有词元 {token}，而模型没有对应的行。请换一个。",
        "With fewer tokens the tokenizer splits the text otherwise; its tokens stay as they are.":
            "词元变少后分词器对文本的切分会改变；词元保持不变。",
        "The tokenizer of {name} is {kind}; tokens can be dropped from byte-level BPE and from BPE with byte "
        "fallback only.":
            "{name} 的分词器是 {kind}；只能从字节级 BPE 或带字节回退的 BPE 中去掉词元。",
        "The tokenizer of {name} marks the parts of words; tokens cannot be dropped from it.": "{name} 的分词器会标记词的组成部分；不能从中去掉词元。",
        "{name} does not take another vocabulary; its tokens stay as they are.": "{name} 不接受其他词表；词元保持不变。",
        "{key} belongs to tokens, too; tokens cannot be dropped from a {kind} model.": "{key} 也属于词元；不能从 {kind} 模型中去掉词元。",
        "nothing is to be removed. Set neurons, heads or channels above 0.": "没有要移除的内容。请把 neurons、heads 或 channels 设为大于 0。",
        "{said} cannot be removed: {said_why}.": "{said}无法移除：{said_why}。",
        "all {said} would be removed. Keep some.": "全部{said}都会被移除。请保留一些。",
        "no multiple of {multiple} is below the width of {width} that {size} {said} have. Use a smaller multiple.":
            "{size} 个{said}的宽度为 {width}，没有比它小的 {multiple} 的倍数。请用更小的 multiple。",
        "no multiple of {multiple} is below the width of {width} that {size} {said} have. Use a smaller multiple or leave them.":
            "{size} 个{said}的宽度为 {width}，没有比它小的 {multiple} 的倍数。请用更小的 multiple，或保持不变。",
        "a share of {share} would remove all {size} {said}; {least} leaves the fewest.": "比例 {share} 会移除全部 {size} 个{said}；{least} 保留得最少。",
        "a share of {share} of {size} {said} is none in steps of {step}; {least} is the smallest share that does, "
        "or use a smaller multiple.":
            "以 {step} 为步长时，{size} 个{said}的 {share} 不足一步；最小可用比例为 {least}，或用更小的 multiple。",
        "linears that are products of two cannot be made narrower. Start from the model that prune/low_rank was applied to, "
        "and put it after prune/width.":
            "由两个线性层相乘而成的线性层无法变窄。请从应用 prune/low_rank 之前的模型开始，并把它放在 prune/width 之后。",
        "the model is of low rank already. Start from the one that prune/low_rank was applied to.":
            "该模型已经是低秩的。请从应用 prune/low_rank 之前的模型开始。",
        "a {family} model has as many channels as its heads have numbers: {heads} heads of {size} and {channels} channels do not fit. "
        "Remove the same share of both.":
            "{family} 模型的通道数等于各头维度之和：{heads} 个维度为 {size} 的头与 {channels} 个通道不符。请按相同比例移除二者。",
        "A bloom model cannot get other widths: its feed-forward width follows from its hidden size, and its positions "
        "from its number of heads. Remove blocks instead (prune/depth).":
            "bloom 模型无法改变宽度：其前馈宽度由隐藏维度决定，位置编码由头数决定。请改为移除层（prune/depth）。",
        "A {family} model cannot get other widths here; {known} can. Remove blocks instead (prune/depth).":
            "{family} 模型在这里无法改变宽度；可以的有 {known}。请改为移除层（prune/depth）。",
        "group_size {size} does not divide the {inputs} inputs of {linear}. Sizes that do: {sizes}.":
            "group_size {size} 不能整除 {linear} 的 {inputs} 个输入。可用的大小：{sizes}。",
        "group_size {size} does not divide the {count} channels of a head. Sizes that do: {sizes}.":
            "group_size {size} 不能整除每个头的 {count} 个通道。可用的大小：{sizes}。",
        "groups of {sizes} do not divide the {inputs} inputs of {linear}. Leave it out with ignore.":
            "大小为 {sizes} 的分组都不能整除 {linear} 的 {inputs} 个输入。请用 ignore 把它排除。",
        "A budget from {most} bits a weight on leaves nothing to choose: all get {bits} bits.":
            "预算达到每个权重 {most} 位时便没有可选的余地：全部用 {bits} 位。",
        "the pattern {pattern} does not divide the {inputs} inputs of {linear}. Choose `unstructured`, "
        "or leave it out with the setting `ignore`.":
            "模式 {pattern} 不能整除 {linear} 的 {inputs} 个输入。请选择 `unstructured`，或用 `ignore` 设置排除它。",
        "a sparsity of {sparsity} leaves none of {count} weights of {linear} that are ranked together. "
        "Keep one at least: {most} or less.":
            "稀疏度 {sparsity} 会使 {linear} 中一起排序的 {count} 个权重一个不留。请至少保留一个：不超过 {most}。",
        "{model} teaches already: the original does, and each other teacher once.":
            "{model} 已经在任教：原始模型本身就是教师，其他教师也各只算一次。",
        "The embeddings of this family are a {kind}; they can only stay as they are.": "该系列的词嵌入是 {kind}；只能保持不变。",
        "{scheme} needs inputs divisible by 64 and outputs by 32; {linear} has {inputs} and {outputs}. "
        "Use int8, or leave it out with ignore.":
            "{scheme} 要求输入能被 64 整除、输出能被 32 整除；{linear} 为 {inputs} 和 {outputs}。请用 int8，或用 ignore 排除它。",
        "{kind} has {said}: its keys and values cannot be quantized. Leave quantize/kv_cache out.":
            "{kind} 有{said}：其键和值无法量化。请去掉 quantize/kv_cache。",
        "{name} has a cache of its own: it cannot be quantized.": "{name} 有自己的缓存：无法量化。",
        "{kind} keeps {layer} in block {number}, not keys and values alone: its cache cannot be quantized.":
            "{kind} 在第 {number} 层保存 {layer}，不只是键和值：其缓存无法量化。",
        "{budget} bits a weight are below the smallest that is possible, {least}.": "每权重 {budget} 位低于可能的最小值 {least}。",
        "a budget of {budget} bits a weight is below the smallest that is possible, {least}.": "每权重 {budget} 位的预算低于可能的最小值 {least}。",
        "a budget of {budget} MiB is below the smallest that is possible, {least}.": "{budget} MiB 的预算低于可能的最小值 {least}。",
        "a budget of {budget} MiB of memory is below the smallest that is possible, {least}.": "{budget} MiB 的内存预算低于可能的最小值 {least}。",
        # texts
        "The text {name} has {tokens} tokens, one sequence needs {length}. Give a longer text or a smaller sequence_length.":
            "文本 {name} 有 {tokens} 个词元，一条序列需要 {length} 个。请换更长的文本，或减小 sequence_length。",
        "{name} is not UTF-8 text (line {number}). Save it as UTF-8.": "{name} 不是 UTF-8 文本（第 {number} 行）。请另存为 UTF-8。",
        "The text {name} is empty.": "文本 {name} 为空。",
        "{name} is a binary file (a NUL in line {number}); a text or JSONL file in UTF-8 is needed.":
            "{name} 是二进制文件（第 {number} 行有 NUL 字符）；需要 UTF-8 的文本文件或 JSONL 文件。",
        "The text {name} cannot be read: {said}.": "文本 {name} 无法读取：{said}。",
        "The text {name} cannot be read: {error}.": "文本 {name} 无法读取：{error}。",
        "{name}, line {number}: a JSON object with a \"text\" that is a string is needed.":
            "{name} 第 {number} 行：需要含有 \"text\" 且其值为字符串的 JSON 对象。",
        "{name}, line {number}: the \"text\" holds half of a surrogate pair. Write the character whole.":
            "{name} 第 {number} 行：\"text\" 中有半个代理对。请写出完整的字符。",
        # runs
        "{count} of your runs are waiting already. Wait for one to start, or cancel one.": "您已有 {count} 个运行在排队。请等其中一个开始，或取消一个。",
        "Run {run} is {said}; only an interrupted or failed run can be resumed.": "运行 {run} 的状态为“{said}”；只有已中断或失败的运行可以继续。",
        "Run {run} is {said}; cancel it first.": "运行 {run} 的状态为“{said}”；请先取消它。",
        "The process of run {run} is just ending. Try again in a moment.": "运行 {run} 的进程正在结束，请稍后再试。",
        "Run {run} has no model yet.": "运行 {run} 还没有模型。",
        "The worker could not be started. {said}": "无法启动工作进程。{said}",
        "The worker could not be started: {said}.": "无法启动工作进程：{said}。",
        "The worker could not be started: {error}.": "无法启动工作进程：{error}。",
        "The worker ended without a result (exit code {code}); worker.log has the details.": "工作进程没有结果就结束了（退出码 {code}）；详情见 worker.log。",
        "The worker crashed in native code ({name}); worker.log has the details.": "工作进程在本机代码中崩溃（{name}）；详情见 worker.log。",
        "The worker was stopped from outside ({name}); the run can be resumed.": "工作进程被外部停止（{name}）；该运行可以继续。",
        "The worker was stopped from outside; the run can be resumed.": "工作进程被外部停止；该运行可以继续。",
        "The worker was killed from outside; memory may have run out. The run can be resumed, with less beside it.":
            "工作进程被外部终止；可能是内存不足。减少同时运行的程序后，该运行可以继续。",
        "The process for {kind} ended without a word; memory may have run out.":
            "负责 {kind} 的进程没有留下信息就结束了；可能是内存不足。",
        "Internal error, please report it: {kind}: {message} (the log has the details)": "内部错误，请报告：{kind}: {message}（详情见日志）",
        "Cancelled.": "已取消。",
        "Stopped.": "已停止。",
        "Stopped before it was done; it can be resumed.": "在完成之前停止；可以继续。",
        "Maquette is shutting down.": "Maquette 正在关闭。",
        "Training diverged at step {step}: {said}. Use a lower learning_rate. {said_kept}": "训练在第 {step} 步发散：{said}。请降低 learning_rate。{said_kept}",
        "Run {run} has no checkpoint to go on from at a lower rate: its last attempt did not diverge, or before the "
        "first one was written.":
            "运行 {run} 没有可供以较低学习率继续的检查点：上一次尝试没有发散，或在写出第一个检查点之前就发散了。",
        "The factor of the learning rate is a number from 0, which ends the training, to below 1.":
            "学习率系数为 0（结束训练）至 1（不含）之间的数。",
        "Training diverged at step {step} in attempt {number}: {said}. Its last good checkpoint was that of step {kept}.":
            "第 {number} 次尝试的训练在第 {step} 步发散：{said}。最后一个完好的检查点是第 {kept} 步的。",
        "Training diverged at step {step} in attempt {number}: {said}. It had no checkpoint.":
            "第 {number} 次尝试的训练在第 {step} 步发散：{said}。当时没有检查点。",
        "{method}: after step {step} the learning rate is {factor} times what the schedule says.":
            "{method}：第 {step} 步之后，学习率为计划值的 {factor} 倍。",
        "{method}: the training ends after step {step}, with the weights of that step.":
            "{method}：训练在第 {step} 步之后结束，权重为该步的权重。",
        "The cache {name} was made by another teacher or tokenizer. Delete the folder {folder} below cache/teachers.":
            "缓存 {name} 由其他教师或分词器生成。请删除 cache/teachers 下的文件夹 {folder}。",
        "Number {number} of the {name} in the saved model computes something else than the one in memory: "
        "{distance} apart, {tolerance} is allowed.":
            "保存的模型中 {name} 的第 {number} 个与内存中的结果不同：相差 {distance}，允许 {tolerance}。",
        "The saved model computes other logits than the one in memory: {distance} apart, {tolerance} is allowed.":
            "保存的模型与内存中的模型算出的 logits 不同：相差 {distance}，允许 {tolerance}。",
        "A process that trained was ended from outside; memory may have run out. Use a smaller batch.":
            "一个训练进程被外部结束；可能是内存不足。请减小批大小。",
        # writing side by side
        "The prompt is empty, and this model has no start token. Write a few words.": "提示词为空，而该模型没有起始词元。请写几个词。",
        "The prompt has {count} tokens; this model reads {limit}. Shorten it.": "提示词有 {count} 个词元；该模型最多读 {limit} 个。请缩短。",
        "The text has {count} tokens; this model reads {limit}. Shorten it.": "文本有 {count} 个词元；该模型最多读 {limit} 个。请缩短。",
        "The prompt has {count} characters; write 1 to {limit}, and no NUL.": "提示词有 {count} 个字符；请写 1 到 {limit} 个，且不含 NUL。",
        "The models have {theirs} and {ours} tokens: their predictions cannot be compared.": "两个模型的词表分别有 {theirs} 和 {ours} 个词元：预测无法比较。",
        "The model has {ours} tokens, the baseline {theirs}: their predictions cannot be compared.":
            "该模型有 {ours} 个词元，基线有 {theirs} 个：预测无法比较。",
        "The same text is compared over all {size} tokens that could come next, which is too much for a text of {length}. "
        "Ask for {most} at most.":
            "同一文本按全部 {size} 个可能的下一词元比较，{length} 个词元的文本过长。请最多要求 {most} 个。",
        "The first model's predictions are gone. Try again.": "第一个模型的预测已不在。请重试。",
        "The first model wrote no text that could be compared.": "第一个模型没有写出可以比较的文本。",
        "The process that held the model has ended; it may have run out of memory. Try again.": "载有模型的进程已结束；可能是内存不足。请重试。",
        "The text ended early. Try again.": "文本提前结束。请重试。",
        "The model could not be loaded.": "模型无法加载。",
        "{count} models were chosen; compare 1 to {most}.": "选择了 {count} 个模型；请比较 1 到 {most} 个。",
        "max_tokens is {count}; it must lie in 1 to {limit}.": "max_tokens 为 {count}；必须在 1 到 {limit} 之间。",
        "The sampling temperature must lie in 0 to 5, the seed in 0 to 2147483647.": "采样温度必须在 0 到 5 之间，种子必须在 0 到 2147483647 之间。",
        # store
        "No data folder can be written: set MAQUETTE_HOME to a folder of yours.": "没有可写的数据文件夹：请把 MAQUETTE_HOME 设为您的文件夹。",
        "{path} was written by a later version of Maquette (schema {version}; this one knows {known}). "
        "Update Maquette, or choose another folder with MAQUETTE_HOME.":
            "{path} 由更新版本的 Maquette 写成（模式 {version}；当前版本认识 {known}）。请更新 Maquette，或用 MAQUETTE_HOME 选择其他文件夹。",
        "Another Maquette uses the folder {folder}. Stop it, or choose another with --home or MAQUETTE_HOME.":
            "另一个 Maquette 正在使用文件夹 {folder}。请停止它，或用 --home 或 MAQUETTE_HOME 选择其他文件夹。",
        "There are no runs in {folder} yet.": "{folder} 中还没有运行。",
        "The run store {path} cannot be used: {error}.": "运行数据库 {path} 无法使用：{error}。",
        "The run store cannot be written: {error}. The server's log has the details.":
            "运行数据库无法写入：{error}。详情见服务器日志。",
        "Another program holds the run store: nothing was stored. Close it, then try again.":
            "另一个程序占用了运行数据库：没有存储任何内容。请关闭它，然后重试。",
        "The run store {path} cannot be read: {error}.": "运行数据库 {path} 无法读取：{error}。",
        # export
        "{path} exists already. Name a folder that does not.": "{path} 已存在。请指定一个不存在的文件夹。",
        "There is no folder {parent} to write {name} into.": "没有可写入 {name} 的文件夹 {parent}。",
        "{name} has no {file}, so it is no artifact of a run. Give the folder that `run` printed.":
            "{name} 没有 {file}，因此不是运行的成品。请给出 `run` 打印的文件夹。",
        "{name} has linears that are products of two, which this format does not know. Export it as dense, "
        "or quantize without prune/low_rank.":
            "{name} 含有由两个线性层相乘而成的线性层，该格式不支持。请导出为 dense，或在量化时不用 prune/low_rank。",
        "{name} holds linears of {kind}, which readers of this format do not know. Export it as dense.":
            "{name} 含有 {kind} 的线性层，该格式的读取程序不认识它们。请导出为 dense。",
        "{name} holds no quantized weights: there is nothing to export.": "{name} 没有量化权重：没有可导出的内容。",
        "{name} is stored as {kind}; only weights in groups or rows of integers, with inputs as they are, can be exported. "
        "Use a weight-only method such as quantize/gptq.":
            "{name} 以 {kind} 存储；只能导出按组或按行的整数权重且输入保持原样的模型。请使用仅量化权重的方法，如 quantize/gptq。",
        "{name} has packed weights beside its blocks ({linear}), which readers of these formats do not expect. "
        "Quantize with `head` and `embeddings` off to export.":
            "{name} 在各层之外还有打包权重（{linear}），这些格式的读取程序不支持。要导出，请在量化时关闭 `head` 和 `embeddings`。",
        "{name}: the inputs of its linears are rounded to 8 bits, which dense weights cannot say. "
        "Use a weight-only method such as quantize/gptq.":
            "{name}：其线性层的输入被舍入到 8 位，稠密权重无法表示。请使用仅量化权重的方法，如 quantize/gptq。",
        "{name}: the inputs of {linear} are rounded to 8 bits, which weight-only formats cannot say. "
        "Use a weight-only method such as quantize/gptq.":
            "{name}：{linear} 的输入被舍入到 8 位，仅权重的格式无法表示。请使用仅量化权重的方法，如 quantize/gptq。",
        "{name}: scales of {linear} ({kind}) are not exact in the float16 that this format stores. "
        "Run the recipe with dtype bfloat16 or float16; where weights are tiny, with fewer bits or larger groups.":
            "{name}：{linear} 的缩放系数（{kind}）无法用该格式的 float16 精确表示。"
            "请用 dtype bfloat16 或 float16 运行配方；权重极小时，请用更少的位数或更大的分组。",
        "{name}: {linear} is {rows} x {columns}; this format needs multiples of {by}. Leave it out with the setting `ignore`.":
            "{name}：{linear} 为 {rows} x {columns}；该格式要求是 {by} 的倍数。请用 `ignore` 设置排除它。",
        "{name}: {linear} has {bits} bits; the AWQ format has 4.": "{name}：{linear} 为 {bits} 位；AWQ 格式只有 4 位。",
        "{name}: {linear} has groups of {size}, most others of {usual}; the AWQ format has one size. Export it as gptq.":
            "{name}：{linear} 的组大小为 {size}，其他多为 {usual}；AWQ 格式只有一种大小。请导出为 gptq。",
        "{name} is stored as any `transformers` user can load it: use the folder as it is.": "{name} 的存储方式任何 `transformers` 用户都能加载：直接使用该文件夹即可。",
        "{name}: {linear} has {bits} bits; the GPTQ format has {known}.": "{name}：{linear} 为 {bits} 位；GPTQ 格式支持 {known} 位。",
        # GGUF
        "{name}: no GGUF of {kind} models can be written here. Those that can: {known}.":
            "{name}：此处不能写出 {kind} 模型的 GGUF。可以写出的有：{known}。",
        "{name}: llama.cpp computes {kind} models without {said}, so no GGUF of it is written.":
            "{name}：llama.cpp 计算 {kind} 模型时不支持{said}，因此不写出 GGUF。",
        "{name}: llama.cpp's {kind} models have no {tensor}, so no GGUF of it is written.":
            "{name}：llama.cpp 的 {kind} 模型没有 {tensor}，因此不写出 GGUF。",
        "{name}: llama.cpp computes the logits of {kind} models with their embeddings, and this one has a head of its own. "
        "Quantize with `head` and `embeddings` off.":
            "{name}：llama.cpp 用词嵌入计算 {kind} 模型的 logits，而此模型有单独的输出头。请在量化时关闭 `head` 和 `embeddings`。",
        "{name} is stored as {kind}, a library's format, of which no GGUF is made. "
        "Use a weight-only method such as quantize/gptq.":
            "{name} 以第三方库的格式 {kind} 存储，不能由此生成 GGUF。请使用仅量化权重的方法，如 quantize/gptq。",
        "{name}: the inputs of its linears are rounded to 8 bits, which a GGUF cannot say. "
        "Use a weight-only method such as quantize/gptq.":
            "{name}：其线性层的输入被舍入到 8 位，GGUF 无法表示。请使用仅量化权重的方法，如 quantize/gptq。",
        "The tokenizer of {name} cannot be written as GGUF: {said}.": "{name} 的分词器无法写成 GGUF：{said}。",
        "Tensors of {bits} bits: {count}, exact in {kind}, which takes {size} bits a weight.":
            "{bits} 位的张量：{count} 个，以 {kind} 精确存储，每个权重占 {size} 位。",
        "Tensors of {bits} bits with zero points: {count}, exact in {kind}, which takes {size} bits a weight.":
            "带零点的 {bits} 位张量：{count} 个，以 {kind} 精确存储，每个权重占 {size} 位。",
        "Written in {kind}, for {said}: {tensors}.": "以 {kind} 写出，因为{said}：{tensors}。",
        "Keys and values stay as they are: llama.cpp packs them with --cache-type-k and --cache-type-v.":
            "键和值保持原样：llama.cpp 可用 --cache-type-k 和 --cache-type-v 压缩它们。",
        "llama.cpp has no sliding window for {kind}, so the file says a context of {count} tokens, a window's length, "
        "up to which that makes no difference.":
            "llama.cpp 对 {kind} 没有滑动窗口，因此文件中的上下文为 {count} 个词元，即一个窗口的长度，在此长度内没有差别。",
        "llama.cpp computes gelu by its tanh approximation.": "llama.cpp 用 tanh 近似计算 gelu。",
        "llama.cpp chooses the short or the long rotations by the context that it is started with, transformers by the "
        "length of the text.":
            "llama.cpp 按启动时的上下文长度选择短或长的旋转，transformers 则按文本长度。",
        "Which blocks have a sliding window is not as usual; older versions of llama.cpp may not read that.":
            "带滑动窗口的层与通常不同；旧版本的 llama.cpp 可能读不到这一点。",
        "llama.cpp puts a space before a text that begins with one, too, which the tokenizer does not.":
            "文本以空格开头时，llama.cpp 仍会在前面再加一个空格，而分词器不会。",
        "llama.cpp does not compose characters (NFC) before it reads a text, as the tokenizer does.":
            "llama.cpp 在读取文本之前不会像分词器那样合成字符（NFC）。",
        "{name}: {linear} has zero points of 0, which the first version of the GPTQ format cannot hold. Export it as gptq_v2.":
            "{name}：{linear} 的零点为 0，GPTQ 格式第一版无法表示。请导出为 gptq_v2。",
        "Run {run} has no model to export: its files were deleted, or it did not finish.":
            "运行 {run} 没有可导出的模型：其文件已删除，或它没有完成。",
        "An export of yours is being made already. Wait for it, or stop it.": "您已有一个导出正在进行。请等待它完成，或停止它。",
        "Stopped; nothing of the export is left.": "已停止；没有留下任何导出内容。",
        "The export took longer than the {minutes} minutes that it has here and was ended. "
        "Export a smaller model, or run Maquette on your own machine.":
            "导出超过了此处允许的 {minutes} 分钟，已被结束。请导出较小的模型，或在您自己的机器上运行 Maquette。",
        "The export ended without a word; memory may have run out. Try again later.":
            "导出没有任何说明就结束了；可能内存不足。请稍后重试。",
        "The run's files were deleted while they were exported.": "该运行的文件在导出过程中被删除了。",
        # goals of the advice
        "The goal is {goal}. Write memory=8GB, latency=0.5 (half), cost or cost=0.3 (USD).":
            "目标为 {goal}。请写 memory=8GB、latency=0.5（一半）、cost 或 cost=0.3（美元）。",
        "{setting} is no assumption with its number. Write it as teacher_price=3; there are {names}.":
            "{setting} 不是带数值的假设。请写成 teacher_price=3；可用的有 {names}。",
        "There is no goal {goal}. Choose memory, latency or cost.": "没有目标 {goal}。请选择 memory、latency 或 cost。",
        "The goal {goal} needs a number: {example}.": "目标 {goal} 需要一个数值：{example}。",
        "The number of the goal {goal} is {value}; it must lie above 0, up to {most}.":
            "目标 {goal} 的数值为 {value}；必须大于 0，且不超过 {most}。",
        # the hub: names and addresses
        "The model is empty or holds a NUL character. {said}": "模型为空或含有 NUL 字符。{said}",
        "Write `demo`, a model of the hub as owner/name, or a folder that begins with / ./ ../ or ~.":
            "请填写 `demo`、Hub 上的模型（owner/name），或以 / ./ ../ 或 ~ 开头的文件夹。",
        "There is no model folder {name}. {said}": "没有模型文件夹 {name}。{said}",
        "There is no model folder {name}, and no hub is at hand. {said}": "没有模型文件夹 {name}，也没有可用的 Hub。{said}",
        "The bundled model has no revisions. Write `demo` alone.": "内置模型没有版本。请只写 `demo`。",
        "Folders of the server cannot be named here. Write `demo` or a model of the hub.":
            "这里不能使用服务器上的文件夹。请填写 `demo` 或 Hub 上的模型。",
        "{name} is too long for the name of a model. {said}": "{name} 太长，不能作为模型的名称。{said}",
        "The folder {name} has no revisions; only a model of the hub has.": "文件夹 {name} 没有版本；只有 Hub 上的模型才有。",
        "{name} is a folder here and may be a model of the hub too. Write {folder} for the folder, {repo} for the hub's.":
            "{name} 在这里是文件夹，也可能是 Hub 上的模型。文件夹请写 {folder}，Hub 上的模型请写 {repo}。",
        "{name} is no address of a model at huggingface.co. {said}": "{name} 不是 huggingface.co 上模型的地址。{said}",
        "{name} is not the address of a model. It reads {address}.": "{name} 不是模型的地址。其形式为 {address}。",
        "{name} is too long for a model of the hub, whose names have up to {limit} characters.":
            "{name} 过长：Hub 上的模型名称最多 {limit} 个字符。",
        "{name} has more than one slash: a model of the hub is owner/name. {said}":
            "{name} 有不止一个斜杠：Hub 上的模型写作 owner/name。{said}",
        "{name} cannot be the name of a model of the hub: letters, digits, single - and ., and _. {said}":
            "{name} 不能作为 Hub 上模型的名称：只能用字母、数字、单个的 - 和 . 以及 _。{said}",
        "{name} cannot be a revision. Write a branch, a tag or a commit, or leave it empty.":
            "{name} 不能作为版本。请填写分支、标签或提交，或留空。",
        "{name} is no model of the hub.": "{name} 不是 Hub 上的模型。",
        # the hub: what it answers
        "{name} is gated: accept its conditions at {address} and give a token of that account.":
            "{name} 需要授权：请在 {address} 接受其条件，并提供该账户的令牌。",
        "{name} is gated, and this token's account may not read it: ask for it at {address}.":
            "{name} 需要授权，而该令牌的账户无权读取：请在 {address} 申请。",
        "The hub does not accept this token (for {name}). It may have expired: give another.":
            "Hub 不接受该令牌（{name}）。它可能已过期：请换一个。",
        "There is no model {name} on the hub, or it is private. Check its name, or give a token that may read it.":
            "Hub 上没有模型 {name}，或它是私有的。请检查名称，或提供有读取权限的令牌。",
        "There is no model {name} on the hub, or it is private. Check its name, "
        "or whether the token's account may read it.":
            "Hub 上没有模型 {name}，或它是私有的。请检查名称，或确认该令牌的账户有读取权限。",
        "{name} has no revision {revision}. Give a branch, a tag or a commit of it.":
            "{name} 没有版本 {revision}。请填写它的分支、标签或提交。",
        "{name} has no file {file} at this revision.": "{name} 的该版本没有文件 {file}。",
        "The hub answers {status} for {name}: {said}. Try again in a few minutes.":
            "Hub 对 {name} 的应答为 {status}：{said}。请几分钟后重试。",
        "The token holds spaces or other characters that no token has. Paste it again.":
            "令牌含有空格或其他不应有的字符。请重新粘贴。",
        "The hub says nothing usable about {name}. Try again later.": "Hub 没有提供 {name} 的可用信息。请稍后重试。",
        "What answers at {address} is no hub: its answer is not JSON.": "{address} 处应答的不是 Hub：其应答不是 JSON。",
        "{name} has its weights in {count} files; that cannot be right.": "{name} 的权重分为 {count} 个文件，这不可能正确。",
        "{name}: {file} has a header of {count} bytes; that cannot be right.": "{name}：{file} 的文件头有 {count} 字节，这不可能正确。",
        "The hub sent {came} of {wanted} bytes of {file}. Try again.": "Hub 只发送了 {file} 的 {wanted} 字节中的 {came} 字节。请重试。",
        "{name} is not downloaded yet. Run it once, or give the folder of a run's model.":
            "{name} 尚未下载。请先运行一次，或给出某次运行的模型文件夹。",
        "the search is not on this machine, and Maquette is offline (HF_HUB_OFFLINE).":
            "Maquette 处于离线状态（HF_HUB_OFFLINE），无法搜索。",
        "{name} is not on this machine, and Maquette is offline (HF_HUB_OFFLINE).":
            "{name} 不在本机，而 Maquette 处于离线状态（HF_HUB_OFFLINE）。",
        "{name} is not complete on this machine, and Maquette is offline (HF_HUB_OFFLINE).":
            "本机上的 {name} 不完整，而 Maquette 处于离线状态（HF_HUB_OFFLINE）。",
        "{name} is still incomplete after its download. Try again.": "{name} 下载后仍不完整。请重试。",
        "{name} needs {needed} GiB more on the disk, {free} are free. Delete old runs, "
        "or choose another folder with MAQUETTE_HOME.":
            "{name} 还需要 {needed} GiB 磁盘空间，可用 {free} GiB。请删除旧的运行，或用 MAQUETTE_HOME 选择其他文件夹。",
        "{name} needs {needed} GiB on the disk, {free} are free. Delete old runs, "
        "or choose another folder with MAQUETTE_HOME.":
            "{name} 需要 {needed} GiB 磁盘空间，可用 {free} GiB。请删除旧的运行，或用 MAQUETTE_HOME 选择其他文件夹。",
        "{name} brings code of its own (auto_map in config.json), which Maquette never runs. Choose a model that "
        "transformers knows by itself.":
            "{name} 带有自己的代码（config.json 中的 auto_map），Maquette 从不运行它。请选择 transformers 本身支持的模型。",
        "The hub names no content for {file}: it gives no ETag that can be used.": "Hub 没有标明 {file} 的内容：没有可用的 ETag。",
        "{file} has {came} bytes where the hub had announced {wanted}.": "{file} 有 {came} 字节，而 Hub 宣称为 {wanted} 字节。",
        "{file} arrived damaged: its content is not what the hub had announced.": "{file} 下载后已损坏：内容与 Hub 宣称的不符。",
        "The download of {file} broke off at {came} of {wanted} bytes.": "{file} 的下载在 {wanted} 字节中的 {came} 字节处中断。",
        "The hub sent another part of {file} than was asked for. Try again.": "Hub 发送的不是 {file} 中所请求的部分。请重试。",
        "The hub sent {count} bytes in {seconds} s.": "Hub 在 {seconds} 秒内只发送了 {count} 字节。",
        "The hub leads in a circle: too many redirects.": "Hub 的重定向成环：重定向过多。",
        "The hub leads to {address}, where nothing was expected.": "Hub 重定向到意料之外的 {address}。",
        "The hub leads to an address that is not encrypted; it is not followed.": "Hub 重定向到未加密的地址；不予跟随。",
        "The hub's answer broke off. Try again.": "Hub 的应答中断。请重试。",
        "The hub answers too slowly. Try again later.": "Hub 应答过慢。请稍后重试。",
        "The hub at {address} cannot be reached: {said}.": "无法连接 {address} 处的 Hub：{said}。",
        "The hub at {address} cannot be reached: {error}.": "无法连接 {address} 处的 Hub：{error}。",
        "The connection to the hub broke: {said}.": "与 Hub 的连接中断：{said}。",
        "The connection to the hub broke: {error}.": "与 Hub 的连接中断：{error}。",
        "The process that downloads ended without a word.": "下载进程没有留下信息就结束了。",
        "Another run downloads this model; waiting.": "另一个运行正在下载此模型；等待中。",
        "{said} Trying again.": "{said}正在重试。",
        "{said} Going on in {seconds} s.": "{said}{seconds} 秒后继续。",
        "{said} Resume the run with it.": "{said}请带上令牌继续此运行。",
        # the hub: pushing a model
        "{name} is no name of a repository. Write it as your-name/model-name.":
            "{name} 不是仓库名称。请写作 `your-name/model-name`（您的名称/模型名称）。",
        "That is no token. Make one with write access in the hub's settings and paste it whole.":
            "这不是令牌。请在 Hub 的设置中创建具有写权限的令牌，并完整粘贴。",
        "Stopped; what was uploaded so far is no commit.": "已停止；此前上传的内容没有形成提交。",
        "The upload took too long and was ended. Try again: files that are there are not sent twice.":
            "上传时间过长，已结束。请重试：已上传的文件不会重复发送。",
        "The upload ended without a word. Try again.": "上传没有留下信息就结束了。请重试。",
        "This server is offline: nothing can be pushed. Download the zip instead.": "该服务器处于离线状态：无法上传。请改为下载 zip。",
        "The hub does not accept the token. Paste one that has not expired, with write access.":
            "Hub 不接受该令牌。请粘贴未过期且有写权限的令牌。",
        "The token may not write there. Use one with write access, and a repository of yours.":
            "该令牌无权写入那里。请使用有写权限的令牌和您自己的仓库。",
        "The hub knows no such place. Check the name before the slash.": "Hub 上没有这个位置。请检查斜杠前的名称。",
        "A repository of that name is in the way. Choose another name.": "已有同名仓库。请换一个名称。",
        "The hub finds a file too large. Choose a smaller model.": "Hub 认为某个文件过大。请选择较小的模型。",
        "The hub has had too many requests. Try again in a few minutes.": "对 Hub 的请求过多。请几分钟后重试。",
        "The hub answered {status}. Try again in a few minutes.": "Hub 的应答为 {status}。请几分钟后重试。",
        "The hub cannot be reached ({kind}). Check the network and try again.": "无法连接 Hub（{kind}）。请检查网络后重试。",
        "The upload failed: {kind}. Try again.": "上传失败：{kind}。请重试。",
        "The model's files are not complete any more. Start its recipe again.": "模型的文件已不完整。请重新启动它的配方。",
        "The model's file {file} is not there any more. Start its recipe again.": "模型的文件 {file} 已不存在。请重新启动它的配方。",
        # chat templates and sets of prompts
        "This model has no chat template: it was made to go on with a text. Choose plain text.":
            "该模型没有对话模板：它用于续写文本。请选择纯文本。",
        "The chat template has {count} characters; {limit} are read. Use plain text.":
            "对话模板有 {count} 个字符；最多读取 {limit} 个。请使用纯文本。",
        "The chat template refuses this: {error}": "对话模板拒绝了此内容：{error}",
        "The chat template writes more than the {limit} characters that are read. Choose plain text.":
            "对话模板写出的内容超过了可读取的 {limit} 个字符。请选择纯文本。",
        "The chat template did not end within {seconds} s. Choose plain text.": "对话模板在 {seconds} 秒内没有结束。请选择纯文本。",
        "The chat template needs too much memory or time. Choose plain text.": "对话模板占用的内存或时间过多。请选择纯文本。",
        "The prompt file has {count} bytes; {limit} are read. Shorten it.": "提示词文件有 {count} 字节；最多读取 {limit} 字节。请缩短。",
        "The prompt file is a binary file. Give a text file with one prompt a line, or JSONL.":
            "提示词文件是二进制文件。请提供每行一条提示词的文本文件，或 JSONL 文件。",
        "The prompt file is empty. Write one prompt a line.": "提示词文件为空。请每行写一条提示词。",
        "The prompt file is not UTF-8 text (byte {place}). Save it as UTF-8.":
            "提示词文件不是 UTF-8 文本（第 {place} 字节）。请另存为 UTF-8。",
        "The prompt file holds more than {limit} prompts. Remove some.": "提示词文件超过 {limit} 条提示词。请删去一些。",
        "Line {number} has no \"prompt\" that is a text: {line}": "第 {number} 行没有内容为文本的 `prompt`：{line}",
        "Line {number} holds an empty prompt. Write a few words, or remove the line.":
            "第 {number} 行的提示词为空。请写几个词，或删去该行。",
        "The prompt in line {number} has {count} characters; the limit is {limit}.":
            "第 {number} 行的提示词有 {count} 个字符，上限为 {limit}。",
        "Line {number} is not JSON. Write {{\"prompt\": \"...\"}} in each line, or name the file .txt.":
            "第 {number} 行不是 JSON。请每行写 `{{\"prompt\": \"...\"}}`，或把文件命名为 `.txt`。",
        "Give up to {most} stop texts, each of 1 to {longest} characters.": "最多 {most} 个停止文本，每个 1 到 {longest} 个字符。",
        "top-p must lie above 0 and up to 1, top-k in 0 (all) to {most}.": "`top-p` 必须大于 0 且不超过 1，`top-k` 必须在 0（全部）到 {most} 之间。",
        "The system prompt has {count} characters; write up to {limit}, and no NUL.":
            "系统提示词有 {count} 个字符；最多 {limit} 个，且不含 NUL。",
        # what one visitor may take, and who may come
        "{name} has {count} billion parameters; this server takes up to {most} billion. Choose a smaller one, "
        "or run Maquette on your own machine.":
            "{name} 有 {count}B 参数；该服务器最多接受 {most}B。请选择较小的模型，或在您自己的机器上运行 Maquette。",
        "The files of {name} hold {size}; this server takes up to {most}. Choose a smaller one, "
        "or run Maquette on your own machine.":
            "{name} 的文件共 {size}；该服务器最多接受 {most}。请选择较小的模型，或在您自己的机器上运行 Maquette。",
        "Your runs hold {used} of the {most} that a visitor has, and this one needs up to {size}. "
        "Delete a run on the Runs tab, or choose a smaller model.":
            "您的运行已占用每位访客 {most} 限额中的 {used}，而此运行最多需要 {size}。请在“运行”页删除一个运行，或选择较小的模型。",
        "The server's disk has {free} left; the run needs up to {size}, and {floor} stay free. "
        "Delete runs of yours, or come back later.":
            "服务器磁盘剩余 {free}；此运行最多需要 {size}，且须保留 {floor}。请删除您的一些运行，或稍后再来。",
        "Your runs hold {used} of the {most} that a visitor has, and the export needs up to {size}. "
        "Delete a run on the Runs tab.":
            "您的运行已占用每位访客 {most} 限额中的 {used}，而导出最多需要 {size}。请在“运行”页删除一个运行。",
        "The server's disk has {free} left; the export needs up to {size}, and {floor} stay free. "
        "Delete runs of yours, or come back later.":
            "服务器磁盘剩余 {free}；导出最多需要 {size}，且须保留 {floor}。请删除您的一些运行，或稍后再来。",
        "The server's disk has {free} left. Choose a smaller model, or come back later.":
            "服务器磁盘只剩 {free}。请选择较小的模型，或稍后再来。",
        "The run took longer than the {limit} minutes that a run has here. Use a smaller model, fewer steps or fewer "
        "measurements, or run Maquette on your own machine.":
            "该运行超过了此处每次运行 {limit} 分钟的限额。请使用较小的模型、更少的步数或测量项，或在您自己的机器上运行 Maquette。",
        "Your runs hold {used} on disk; a visitor has {most}. This one was ended and its files are deleted. "
        "Delete a run on the Runs tab, or choose a smaller model.":
            "您的运行占用了 {used} 磁盘空间；每位访客的限额为 {most}。此运行已结束，其文件已删除。"
            "请在“运行”页删除一个运行，或选择较小的模型。",
        "{name}: on a shared server the bundled text is used; set it to demo or leave it out.":
            "{name}：共享服务器上只使用内置文本；请设为 demo 或不填。",
        "{name} cannot be used on a shared server: name demo, or a model of the hub as owner/name.":
            "共享服务器上不能使用 {name}：请填写 demo，或 Hub 上的模型（`owner/name`）。",
        "Models of {owner} are not offered here, those of {known} are.": "这里不提供 {owner} 的模型，提供的有 {known}。",
        "That was too often in a short time. Try again in {seconds} seconds.": "短时间内操作过于频繁。请在 {seconds} 秒后重试。",
        "The run needs {needed} GiB; on ZeroGPU {most} can be used. Choose a smaller model, "
        "or run Maquette on a machine of its own.":
            "该运行需要 {needed} GiB；ZeroGPU 上最多可用 {most} GiB。请选择较小的模型，或在单独的机器上运行 Maquette。",
        "The run would take about {seconds} s; on ZeroGPU a run has {most}. Use fewer steps, calibration samples "
        "or measurements, or run Maquette on a machine of its own.":
            "该运行大约需要 {seconds} 秒；ZeroGPU 上每次运行最多 {most} 秒。请减少步数、校准样本或测量项，或在单独的机器上运行 Maquette。",
        "ZeroGPU gave the run no GPU, or took it away. Resume it later. It said: {said}":
            "ZeroGPU 未给该运行分配 GPU，或已将其收回。请稍后继续。其说明：{said}",
        "In local mode Maquette listens on this machine alone, not on {host}. Set MAQUETTE_MODE=team (with `python -m "
        "engine user add NAME`) or MAQUETTE_MODE=public, or HOST=127.0.0.1.":
            "本地模式下 Maquette 只在本机监听，而不监听 {host}。请设置 MAQUETTE_MODE=team（并用 `python -m engine user add NAME` "
            "添加用户）或 MAQUETTE_MODE=public，或 HOST=127.0.0.1。",
        "{variable} is {value}; it must be a number above 0.": "{variable} 为 {value}；必须是大于 0 的数。",
        "MAQUETTE_MODE is {value}; it must be one of {modes}.": "MAQUETTE_MODE 为 {value}；必须是 {modes} 之一。",
        "{name} is no user name: 1 to 32 of a-z, 0-9, dot, - and _, a letter or digit first.":
            "{name} 不能作为用户名：须为 1 到 32 个 a-z、0-9、点、- 和 _，以字母或数字开头。",
        "The password has {count} characters; it needs {least} to {most}.": "密码有 {count} 个字符；须为 {least} 到 {most} 个。",
        "The users file {path} cannot be read. Repair it, or delete it and begin anew.":
            "无法读取用户文件 {path}。请修复它，或删除后重新开始。",
        # notes of an estimate
        "{said_method}: {said_note}": "{said_method}：{said_note}",
        # how something was measured
        "all weight files": "全部权重文件",
        "all stored tensors, scales and zero points included, over all parameters":
            "存储的全部张量（含缩放系数和零点）除以全部参数量",
        "zeros among the dense matrices of the blocks": "各层稠密矩阵中的零",
        "highest total log-probability of the options, zero-shot": "取总对数概率最高的选项，零样本",
        "mean of the tasks": "各任务的平均", "median": "中位数",
        "new tokens over the whole time, prompt included": "新词元数除以总时间（含提示词）",
        "tokens of a step over its median time": "每步的词元数除以其用时的中位数",
        "every token of the held-out documents": "留出文档的每个词元",
        "every token of the held-out documents, written with the tokens that the model kept; the baseline's "
        "probabilities are of those alone, renormalised":
            "留出文档的每个词元，用模型保留的词元书写；基线的概率只取这些词元并重新归一化",
        "growth by loading": "加载引起的增长",
        "loaded + highest growth, {said}": "加载后内存 + 最大增长（{said}）",
        "tensors that are held after reading one sequence": "读完一条序列后保留的张量",
        "each held-out document alone, start token prepended": "每篇留出文档单独计算，前加起始词元",
        "Use fewer calibration samples or a smaller model, or close other programs.":
            "请减少校准样本或换用较小的模型，或关闭其他程序。",
        "Larger than memory: one block at a time.": "大于内存：逐层处理。",
        "Kernels compute on packed weights in bfloat16: in another dtype they are small in files, not in memory.":
            "内核仅在 bfloat16 下直接对打包权重计算；采用其他数据类型时，文件变小而内存不变。",
        # the log and the audit
        "warning: the text is short, it has {count} of the {asked} sequences asked for":
            "警告：文本太短，只有所要求的 {asked} 条序列中的 {count} 条",
        "calibrating on {count} sequences of {tokens} tokens": "用 {count} 条、每条 {tokens} 个词元的序列校准",
        "reused {count} finished blocks": "复用了 {count} 个已完成的层",
        "resumed at step {step} of {steps}": "从第 {step} 步（共 {steps} 步）继续",
        "after step {step} the learning rate is {factor} times what the schedule says":
            "第 {step} 步之后，学习率为计划值的 {factor} 倍",
        "warning: the training ends after step {step}, with the weights of that step":
            "警告：训练在第 {step} 步之后结束，权重为该步的权重",
        "{linear}: {said}": "{linear}：{said}",
        "training in {count} processes": "用 {count} 个进程训练",
        "mixtures of experts train in one process": "混合专家模型用一个进程训练",
        "weights on a grid train in one process": "网格上的权重用一个进程训练",
        "the teacher answered for {tokens} tokens; {reused} of {count} files reused": "教师为 {tokens} 个词元给出了答案；{count} 个文件中复用 {reused} 个",
        "reused the teacher's answers of an earlier run ({count} files); it is not loaded": "复用了先前运行中教师的答案（{count} 个文件）；不加载教师",
        "the teacher {name} is larger than half of the free memory: one block at a time": "教师 {name} 大于可用内存的一半：逐层处理",
        "cut {gone} of {all} weights, the largest of them {largest}": "剪去 {all} 个权重中的 {gone} 个，其中最大的为 {largest}",
        "{count} of {total} tokens stay; the text is split as before": "{total} 个词元保留 {count} 个；文本切分不变",
        "the calibration text takes {times} times as many tokens as before": "校准文本所需词元数为原来的 {times} 倍",
        "the text uses, or needs, all {total} tokens: nothing is dropped": "文本用到或需要全部 {total} 个词元：没有去掉任何词元",
        "{share} of the input channels have outliers above {threshold} and stay 16 bit": "{share} 的输入通道有超过 {threshold} 的离群值，保持 16 位",
        "{name} cannot keep packed documents apart: they see each other": "{name} 无法隔开打包的文档：它们能互相看到",
        "warning: only {count} sizes lie between the model and the student": "警告：模型与学生之间只有 {count} 种尺寸",
        "assistant {number} of {count}: {depth} blocks of {width}": "第 {number} 个助教（共 {count} 个）：{depth} 层，宽度 {width}",
        "the highest learning rate is {rate}, by the size of the model": "最高学习率为 {rate}，按模型大小决定",
        "{count} numbers are trained; the model has {total} parameters": "训练 {count} 个数值；模型共有 {total} 个参数",
        "{count} of {total} parameters": "{total} 个参数中的 {count} 个",
        "warning: the student is the teacher itself; there is nothing to learn from it but the labels":
            "警告：学生就是教师本身；除标签外没有可学的",
        "warning: the student is larger than the model": "警告：学生比模型还大",
        "this assistant is finished": "该助教已完成",
        "{count} parameters": "{count} 个参数",
        "the teacher's {count} sequences: written now": "教师的 {count} 条序列：刚刚写成",
        "the teacher's {count} sequences: reused, it is not loaded": "教师的 {count} 条序列：复用，不加载教师",
        "{said}: {count} pieces were measured before, the others follow": "{said}：先前已测量 {count} 项，继续其余部分",
        "{said}: measured before, now reused": "{said}：先前已测量，直接复用",
        "block {number}: {said_by} {cost}, removed": "第 {number} 层：{said_by} {cost}，已移除",
        "block {number}: {said_by} {cost}": "第 {number} 层：{said_by} {cost}",
        "blocks {first} to {last}: {said_by} {cost}, removed": "第 {first} 至 {last} 层：{said_by} {cost}，已移除",
        "blocks {first} to {last}: {said_by} {cost}": "第 {first} 至 {last} 层：{said_by} {cost}",
        "{said}: {size} of {total} stay in each block, with {share} of the importance":
            "{said}：每层 {total} 个中保留 {size} 个，占重要性的 {share}",
        "{said}: {size} of {total} stay, with {share} of the importance": "{said}：{total} 个中保留 {size} 个，占重要性的 {share}",
        "KV cache {bits} bit, unpacked for attention": "KV 缓存 {bits} 位，计算注意力时解包",
        "KV cache {bits} bit, attention reads the codes": "KV 缓存 {bits} 位，注意力直接读取整数码",
        "kernels: {names}": "算子：{names}",
        "sensitivity is measured before quantizing: this model's weights are packed": "敏感度应在量化之前测量：该模型的权重已打包",
        "reused what an earlier run has done: {titles}": "复用了先前运行的成果：{titles}",
        "read back {said}: logits {distance} apart": "已{said}读回：logits 相差 {distance}",
        "{count} sequences of {tokens} tokens of the calibration text, one block at a time": "校准文本的 {count} 条序列，每条 {tokens} 个词元，逐层测量",
    }
)
