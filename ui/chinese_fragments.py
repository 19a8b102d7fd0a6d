"""Parts of what the engine says, and what libraries say inside of it (pydantic, PyYAML, the system), in Chinese.

As `ui.chinese_messages`, whose lines they stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# fmt: off
FRAGMENTS: Mapping[str, str] = MappingProxyType(
    {
        "method": "方法", "measurement": "测量项", "run": "运行", "key": "键", "key of model": "model 的键",
        "key of a step": "步骤的键", "user": "用户", "assumption": "假设", "preset": "预设", "setting of {method}": "{method} 设置", "format": "格式",
        "{one} or {other}": "{one} 或 {other}",
        "queued": "排队中", "running": "运行中", "succeeded": "已完成", "failed": "失败", "cancelled": "已取消",
        "interrupted": "已中断", "refused": "已拒绝",
        # GGUF: what llama.cpp does not compute of a family, why weights are written as numbers, and tokenizers
        "the activation {value}": "激活函数 {value}",
        "heads of {size} that are not the hidden size {hidden} together": "大小为 {size}、合起来不等于隐藏维度 {hidden} 的头",
        "rope_type {value}": "旋转类型 {value}",
        "scaled rotations in sliding windows": "滑动窗口中缩放的旋转",
        "query_pre_attn_scalar = {value} for {count} blocks": "{count} 层时的 query_pre_attn_scalar = {value}",
        "attention or logits that are not capped": "不设上限的注意力或 logits",
        "shared keys and values": "共享的键和值",
        "a single expert": "单个专家",
        "{key} = {value}": "设置 {key} = {value}",
        "8-bit floats are in no type of GGUF": "GGUF 没有 8 位浮点类型",
        "rows of {width} weights fill no blocks of {size}": "每行 {width} 个权重不能填满 {size} 个一块",
        "groups of {width} weights fill no blocks of {size}": "每组 {width} 个权重不能填满 {size} 个一块",
        "{bits} bits with zero points have more levels than a type of GGUF": "带零点的 {bits} 位的级数多于 GGUF 的任何类型",
        "their scales are not exact in float16": "其缩放系数无法用 float16 精确表示",
        "no type of GGUF holds all experts of a block": "没有 GGUF 类型能容纳一层的所有专家",
        "llama.cpp wants them in 32 bits": "llama.cpp 要求 32 位",
        "it puts several tokens around a text, where llama.cpp has one before and its end after":
            "它在文本前后加多个词元，而 llama.cpp 只能在前面加一个、在后面加结束词元",
        "it is {kind}, and only BPE of bytes or with byte fallback can be": "它是 {kind}，只有字节级 BPE 或带字节回退的 BPE 可以",
        "it falls back to bytes, and lacks some of them": "它回退到字节，却缺少其中一些",
        "it has the token {token}, and there are embeddings of {count} alone": "它有词元 {token}，而只有 {count} 个词嵌入",
        "two of its tokens are written alike, or one is empty": "它有两个词元写法相同，或有一个为空",
        "it changes a text first ({kind}), which llama.cpp does not": "它会先改变文本（{kind}），而 llama.cpp 不会",
        "llama.cpp has no rule that splits a text as it does ({rule})": "llama.cpp 没有与它相同的切分规则（{rule}）",
        "llama.cpp has its rule only with ignore_merges = {value}": "llama.cpp 的这一规则仅适用于 ignore_merges = {value}",
        "it treats spaces as SentencePiece does not": "它对空格的处理与 SentencePiece 不同",
        "its merges are not those that SentencePiece makes of its tokens": "它的合并不是 SentencePiece 会由其词元得到的合并",
        "neurons": "神经元", "heads": "注意力头", "channels": "通道", "feed-forward neurons": "前馈神经元",
        "attention units": "注意力单元", "missing": "缺失", "mismatched": "不匹配",
        "a cache of its own": "自己的缓存", "layers of {kind}": "{kind} 类型的层",
        "{family} normalises the queries of all heads together": "{family} 对所有头的查询一起归一化",
        "this stablelm has a norm for each head": "该 stablelm 的每个头各有归一化",
        "the positions of this falcon follow from its number of heads (ALiBi)": "该 falcon 的位置编码由头数决定（ALiBi）",
        "this opt projects its embeddings to another size": "该 opt 把词嵌入投影到其他维度",
        "this opt has norms that cannot be corrected for fewer channels": "该 opt 的归一化无法适应更少的通道",
        "{family} is a mixture of experts": "{family} 是混合专家模型",
        "it has {theirs} tokens, the model {ours}": "它有 {theirs} 个词元，模型有 {ours} 个",
        "token {token} has the id {there} there and {here} here": "词元 {token} 在那里的编号为 {there}，在这里为 {here}",
        "the loss is {value}": "损失为 {value}", "the held-out KL is {value}": "留出文本上的 KL 为 {value}",
        "the held-out KL is {value}, after {best}": "留出文本上的 KL 为 {value}，此前最低为 {best}",
        "a gradient is not finite": "梯度不是有限值",
        "weights are not finite": "权重不是有限值",
        "The checkpoint of step {step} is kept.": "第 {step} 步的检查点已保留。",
        "No checkpoint was written yet.": "尚未写入检查点。",
        "{linear} is missing": "{linear} 缺失", "{linear} holds NaN or infinite values": "{linear} 含有 NaN 或无穷大",
        "experts are stored without zero points.": "专家的存储没有零点。",
        "the library knows linears only, and fused experts are none.": "该库只认识线性层，而融合的专家不是。",
        "files cannot say that the inputs of experts are rounded.": "文件无法表示专家的输入被舍入。",
        "experts are stored with the same bits, all of them.": "全部专家以相同的位数存储。",
        # ways out of too little memory; sizes in GiB
        "4 bit needs {size}": "改用 4 位需要 {size} GiB",
        "without the original beside it, it needs {size}": "不同时加载原始模型需要 {size} GiB",
        "measuring `size` alone needs {size}": "只测量 `size` 需要 {size} GiB",
        "32 shorter calibration sequences need {size}": "改用 32 条较短的校准序列需要 {size} GiB",
        "a batch of 2 needs {size}": "批大小改为 2 需要 {size} GiB",
        "training additions of low rank needs {size}": "改为训练低秩增量需要 {size} GiB",
        "a student of every second block needs {size}": "学生改为每隔一层取一层需要 {size} GiB",
        "asking the teacher once, before, needs {size}": "预先只问教师一次需要 {size} GiB",
        "GPTQ block by block needs {size}": "逐层执行 GPTQ 需要 {size} GiB",
        # notes of methods
        "The zeros take as many bits as other weights; the file is no smaller for them.": "零与其他权重占用同样的位数；文件不会因此变小。",
        "The model reads {count} tokens at most and all of them stay exact: the cache is no smaller.":
            "该模型最多读取 {count} 个词元，而它们全部保持精确：缓存不会变小。",
        "The model has no experts: whose tokens calibrate them changes nothing.":
            "该模型没有专家：用哪些词元校准专家不起作用。",
        "Each expert calibrates on {times} times the tokens that it gets on average.":
            "每个专家用于校准的词元数，是平均分给它的 {times} 倍。",
        "The file becomes smaller; memory and speed do not.": "文件变小；内存和速度不变。",
        "No smaller and no faster here: the zeros stay dense.": "在这里不会更小也不会更快：零仍以稠密方式存储。",
        "The file becomes smaller; where CUDA's 2:4 kernel takes a linear, its weights take 9/16 of the GPU's memory. "
        "The measured latency says whether it is faster.":
            "文件变小；CUDA 的 2:4 算子适用的线性层，其权重占显存的 9/16。是否更快以实测延迟为准。",
        "The file becomes no smaller; where CUDA's 2:4 kernel takes a linear, its weights take 9/16 of the GPU's memory. "
        "The measured latency says whether it is faster.":
            "文件不会变小；CUDA 的 2:4 算子适用的线性层，其权重占显存的 9/16。是否更快以实测延迟为准。",
        "The student has every block of the teacher: it is as large, and begins as the teacher itself.":
            "学生包含教师的每一层：大小相同，并以教师本身为起点。",
        "The student is as large as the teacher, or larger: nothing gets smaller.": "学生与教师一样大或更大：不会变小。",
        "The student is the teacher itself.": "学生就是教师本身。",
        "Of {asked} assistants {count} are taught: no more sizes lie between.": "要求的 {asked} 个助教中只教 {count} 个：其间没有更多尺寸。",
        "Elsewhere it computes something else than is measured here: compressed-tensors rounds the inputs of OPT's MLP "
        "number by number, not by token.":
            "在其他程序中，其计算结果与此处测量的不同：compressed-tensors 对 OPT 的 MLP 输入逐个数取整，而不是按词元。",
        "No step before changes the model: the student begins as the teacher itself.":
            "此前没有步骤改变模型：学生以教师本身为起点。",
        "It reads the demo's text alone, which tells of a small made-up world. Give a text of your own; a shared "
        "server takes none: run Maquette on your own machine.":
            "它只读取演示文本，其内容是一个虚构的小世界。请给出您自己的文本；共享服务器不接受文本，请在自己的机器上运行 Maquette。",
        # notes on linears
        "{said_note}; only {tokens} tokens reached it": "{said_note}；只有 {tokens} 个词元到达它",
        "only {tokens} tokens reached it": "只有 {tokens} 个词元到达它", "no token reached it": "没有词元到达它",
        "damping raised from {low} to {high}": "阻尼从 {low} 提高到 {high}",
        "rounded to nearest instead, the smallest weights set to zero, {said}": "改为就近舍入并把最小的权重置零，{said}",
        "rounded to nearest instead, {said}": "改为就近舍入，{said}",
        "its Hessian is not positive definite (order {order})": "其 Hessian 矩阵不正定（第 {order} 阶）",
        "{bits} bits in groups of {size}": "{bits} 位，组大小 {size}",
        "no scale: no operation before it takes one, or none helps": "没有缩放系数：前面的运算无法吸收，或缩放没有帮助",
        "not smoothed: no operation before it takes the scale": "没有平滑：前面的运算无法吸收缩放系数",
        "left as they are: {names}": "保持不变：{names}",
        "distance to the original {before} before, {after} after distillation": "与原始层的距离：蒸馏前 {before}，蒸馏后 {after}",
        "no token reached it, scored by magnitude alone": "没有词元到达它，只按幅值评分",
        "no token reached it, its own singular values decide": "没有词元到达它，由其自身奇异值决定",
        "its own singular values decide, {said}": "由其自身奇异值决定，{said}",
        "left as it is, for two linears of that quality would not be smaller": "保持不变：同样质量的两个线性层并不会更小",
        "pruned by magnitude instead, {said}": "改为按幅值剪枝，{said}",
        "{share} set to zero": "{share} 置零",
        "influence": "影响", "angle over pi": "角度 / π", "loss in nats without it": "去掉后的损失（nat）",
        "norms of inputs": "输入范数", "width by {by}": "宽度（{by}）", "depth by {by}": "深度（{by}）",
        "{name}, {cores} cores, {memory} GiB": "{name}，{cores} 核，{memory} GiB",
        "{name}, {cores} cores, {memory} GiB, {gpu}": "{name}，{cores} 核，{memory} GiB，{gpu}",
        "by the allocator": "由分配器记录", "high-water mark of the kernel": "由内核记录的最高值",
        "looked at every {span} ms": "每 {span} ms 查看一次",
        "dense {dtype} x {count}": "稠密 {dtype} x {count}", "dense {dtype}": "稠密 {dtype}",
        "KV cache {bits} bit": "KV 缓存 {bits} 位", "unpacked for attention": "计算注意力时解包",
        "attention reads the codes": "注意力直接读取整数码",
        "part by part, for it is large": "逐部分（因为较大）", "with transformers": "用 transformers ",
        "by Maquette's own reader, for the format is its own": "用 Maquette 自己的读取程序（因为格式是自有的）",
        # pydantic
        "Input should be greater than or equal to {value}": "应大于或等于 {value}",
        "Input should be less than or equal to {value}": "应小于或等于 {value}",
        "Input should be greater than {value}": "应大于 {value}", "Input should be less than {value}": "应小于 {value}",
        "Input should be a valid integer": "应为整数", "Input should be a valid number": "应为数字",
        "Input should be a valid integer, got a number with a fractional part": "应为整数，而不是小数",
        "Input should be a valid integer, unable to parse string as an integer": "应为整数，无法把该文字读成整数",
        "Input should be a valid number, unable to parse string as a number": "应为数字，无法把该文字读成数字",
        "Input should be a valid string": "应为文字", "Input should be a valid boolean": "应为 true 或 false",
        "Input should be a valid boolean, unable to interpret input": "应为 true 或 false",
        "Input should be a valid dictionary": "应为映射", "Input should be a valid tuple": "应为列表",
        "Input should be a valid array": "应为列表", "Input should be an object": "应为映射",
        "Input should be a valid list": "应为列表", "Input should be a finite number": "应为有限的数字",
        "Input should be a valid dictionary or instance of {name}": "应为 {name} 映射",
        "Input should be {name} or {other}": "应为 {name} 或 {other}", "Input should be {name}": "应为 {name}",
        "Field required": "缺少此项", "Extra inputs are not permitted": "不允许有此项",
        "String should have at least {count} character": "至少 {count} 个字符",
        "String should have at least {count} characters": "至少 {count} 个字符",
        "String should have at most {count} character": "至多 {count} 个字符",
        "String should have at most {count} characters": "至多 {count} 个字符",
        "Tuple should have at most {count} items after validation, not {got}": "至多 {count} 项，而不是 {got} 项",
        "Tuple should have at most {count} items after validation, not more": "至多 {count} 项",
        "no checkpoint is named for the student. Write `demo`, owner/name of the hub, or a folder":
            "没有为学生指定检查点。请填写 `demo`、Hub 上的 owner/name 或文件夹",
        "a quote is not closed. Put a name that holds spaces or quotes in quotes":
            "引号没有闭合。含空格或引号的名称请加引号",
        "{pattern} is no regular expression ({error})": "{pattern} 不是正则表达式（{error}）",
        "{pattern} has {count} characters; at most {limit} are read": "{pattern} 有 {count} 个字符；最多读取 {limit} 个",
        "{pattern} has braces that are no counts, or counts of more than {limit} repeats in all":
            "{pattern} 中的花括号不是次数，或次数合计超过 {limit} 次",
        "{pattern} is no pattern with 2 to 8 bits, as in `*.down_proj=8`":
            "{pattern} 不是带有 2 到 8 位的模式，例如 `*.down_proj=8`",
        # YAML
        "mapping values are not allowed here": "此处不能有映射值", "could not find expected ':'": "缺少“:”",
        "found unhashable key": "键不可哈希", "found undefined alias {name}": "未定义的别名 {name}",
        "found character {name} that cannot start any token": "字符 {name} 不能出现在此处",
        "expected ',' or ']', but got {got}": "应为“,”或“]”，而不是 {got}",
        "expected ',' or '}}', but got {got}": "应为“,”或“}}”，而不是 {got}",
        "expected <block end>, but found {got}": "结构应在此结束，而不是 {got}",
        "expected the node content, but found {got}": "缺少内容，出现了 {got}",
        "found unexpected end of stream": "内容意外结束", "unreadable": "无法读取",
        "special characters are not allowed": "不允许特殊字符",
        "could not determine a constructor for the tag {name}": "无法识别标签 {name}",
        # the operating system
        "No such file or directory": "没有该文件或文件夹", "Permission denied": "没有权限", "Is a directory": "这是文件夹",
        "No space left on device": "磁盘已满", "Input/output error": "读写错误", "File name too long": "文件名过长",
        "Not a directory": "不是文件夹", "Too many open files": "打开的文件过多",
        "Too many levels of symbolic links": "符号链接层数过多", "Cannot allocate memory": "无法分配内存",
        "Connection refused": "连接被拒绝", "Connection reset by peer": "连接被对方重置", "Network is unreachable": "网络不可达",
        "No route to host": "没有到主机的路由", "Name or service not known": "域名无法解析",
        "Temporary failure in name resolution": "域名解析暂时失败", "Read-only file system": "文件系统只读",
        "Disk quota exceeded": "超出磁盘配额", "Stale file handle": "文件句柄已失效", "the disk failed": "磁盘故障",
        "it does not answer in time": "没有及时应答", "too many requests": "请求过多", "it is out of order": "服务异常",
        "the address or the token holds characters that cannot be sent": "地址或令牌含有无法发送的字符",
    }
)
# fmt: on
