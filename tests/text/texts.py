r"""Prompts that a tokenizer can get wrong: languages, emoji, control characters, special words, long, empty, random."""

import random
import unicodedata

_LINES = r"""
a photograph of an astronaut riding a horse
A Dog!
hello, world
the quick brown fox jumps over the lazy dog
don't can't I'll we're they've I'm he'd it's 's 't
ISN'T IT? WE'LL SEE. 'TIS
rock'n'roll o'clock
masterpiece, best quality, (ultra-detailed:1.3), [bad], {x}
8k, 4K UHD, f/1.8, 35mm, ISO 100, 1/250s
1234567890 3.14159 1,000,000 ½ ¼ ² ³ Ⅷ ① ٣ १२३ 三 〇
naïve café résumé Zürich Ærøskøbing Łódź İstanbul ISTANBUL ılık
Straße GROẞ ẞ
ΑΣ ΟΔΥΣΣΕΥΣ ὈΔΥΣΣΕΎΣ άέήίόύώ
Привет, мир! Ёлка ЁЛКА й и̌
שלום עולם בְּרֵאשִׁית
مرحبا بالعالم السَّلَامُ عَلَيْكُمْ
नमस्ते दुनिया क्षत्रिय
สวัสดีชาวโลก น้ำ
你好，世界。一只猫在椅子上
こんにちは世界 カタカナ ｶﾀｶﾅ ﾊﾟ
안녕하세요 세계 각
ｆｕｌｌ ｗｉｄｔｈ ＡＢＣ １２３
ﬁne ﬂow ﬀ ﬃ ĳ Ǆ ǅ
“curly quotes” ‘single’ — dash – … ellipsis
&lt;b&gt; &amp; &quot; &#39; &nbsp;
<b>bold</b> <|endoftext|> <|startoftext|> <|ENDOFTEXT|>
<|endoftext|><|endoftext|>a
a<|startoftext|>b <| endoftext |>
! !! !!! !a! a!b
cafe\u0301 e\u0301 \u0301 a\u0323\u0307 A\u030a \u212b
\u1100\u1161\u11a8 Hangul jamo
😀 😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇩🇪 ❤️ ☃ ™ © ®
a😀b 1😀2 😀!
tab\tnew\nline\r\nvertical\x0bform\x0cfeed
nul\x00bell\x07esc\x1bdel\x7fc1\x85\x9f
\x1c\x1d\x1e\x1f separators
no\u00a0break\u2003em\u3000ideographic\u2028line\u2029para\u1680ogham\u180emongolian
zero\u200bwidth\u200cnon\u200djoiner\ufeffbom\u2060word
rtl \u202emark\u202c \u200e \u200f
soft\u00adhyphen
_under_score_ __init__ a_b
C++ C# F# .NET node.js e=mc^2 a&&b x||y ~/path C:\\dir
https://example.com/a?b=c&d=e#f user@example.com @user #tag
$5 €10 £3 ¥100 ₿ 50% 20°C ±5 ×2 ÷3
∀x∈ℝ ∃y: x²+y²=1 ∫ √2 ∞ ≠ ≤
𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒜 𝟙𝟚 ℌ
ꙮ ჻ Ⴀა Აა Ꭰꭰ ꮿ 𐐀𐐨 𞤀𞤢
\ud7ff \ue000 \ufffd \uffff \U0010ffff \U000f0000
supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis
xqzjkvbnm qwrtypsdfghjklzxcvbnm
a  b   c    d
 leading and trailing 
'''''' \"\"\"\"\"\" ------- ======= ......
, . ; : ! ? ' " ( ) [ ] { } / \\ | ` ~ @ # $ % ^ & * - + =
"""
_RANGES = (
    (0x20, 0x7F),
    (0, 0x100),
    (0, 0x250),
    (0x300, 0x600),
    (0x600, 0x1000),
    (0x1E00, 0x2200),
    (0x3000, 0xD7FF),
    (0xF900, 0x10000),
    (0x10000, 0x11000),
    (0x1F300, 0x1FB00),
)


def texts() -> list[str]:
    """The same texts at each call, over 250; only characters that this Python's Unicode has."""
    rng = random.Random(0)
    lines = [line.encode("latin-1", "backslashreplace").decode("unicode_escape") for line in _LINES.split("\n")]
    words = [word for line in lines for word in line.split()]
    found = [*lines, " ", "\n", "\t \n", "   ", "\x00"]
    found += [" ".join(rng.choice(words) for _ in range(count)) for count in (300, 77, 76, 75, 74, 150)]
    found += ["cat " * count for count in (74, 75, 76, 77)] + ["😀" * 100, "a" * 400, "word" * 100, "猫" * 200]
    for _ in range(18):
        for low, high in _RANGES:
            characters = [chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 60))]
            found.append("".join(c if rng.random() < 0.8 else " " for c in characters))
    return ["".join(c for c in text if unicodedata.category(c) not in ("Cn", "Cs")) for text in found]
