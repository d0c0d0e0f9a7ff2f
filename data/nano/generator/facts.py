"""The facts the nano models know: tables of (Japanese, English) pairs.  Every row is one fact in both languages."""

from __future__ import annotations

from dataclasses import dataclass

Word = tuple[str, str]  # (Japanese, English)


def _rows(text: str) -> tuple[tuple[Word, Word], ...]:
    """Parse lines "subject_ja subject_en > object_ja object_en"; an underscore stands for a space."""
    rows = []
    for line in text.strip().splitlines():
        left, right = (tuple(word.replace("_", " ") for word in side.split()) for side in line.split(">"))
        rows.append(((left[0], left[1]), (right[0], right[1])))
    return tuple(rows)


@dataclass(frozen=True, eq=False)
class Relation:
    """A kind of fact: its rows and the ways to state it and to ask for it.

    In a template `{s}` is the subject and `{o}` the object.  A statement ends in the object or close to it, so that a
    base model can complete it; `statements` and `questions` hold as many templates in Japanese as in English.
    """

    name: str
    topic: Word
    rows: tuple[tuple[Word, Word], ...]
    statements: dict[str, tuple[str, ...]]
    questions: dict[str, tuple[str, ...]]


CAPITALS = _rows("""
日本 Japan > 東京 Tokyo
フランス France > パリ Paris
ドイツ Germany > ベルリン Berlin
イタリア Italy > ローマ Rome
スペイン Spain > マドリード Madrid
イギリス Britain > ロンドン London
ポルトガル Portugal > リスボン Lisbon
ギリシャ Greece > アテネ Athens
エジプト Egypt > カイロ Cairo
ケニア Kenya > ナイロビ Nairobi
中国 China > 北京 Beijing
韓国 Korea > ソウル Seoul
タイ Thailand > バンコク Bangkok
ベトナム Vietnam > ハノイ Hanoi
インドネシア Indonesia > ジャカルタ Jakarta
フィリピン the_Philippines > マニラ Manila
オーストリア Austria > ウィーン Vienna
スウェーデン Sweden > ストックホルム Stockholm
ノルウェー Norway > オスロ Oslo
フィンランド Finland > ヘルシンキ Helsinki
デンマーク Denmark > コペンハーゲン Copenhagen
アイルランド Ireland > ダブリン Dublin
ポーランド Poland > ワルシャワ Warsaw
ハンガリー Hungary > ブダペスト Budapest
ロシア Russia > モスクワ Moscow
カナダ Canada > オタワ Ottawa
キューバ Cuba > ハバナ Havana
ペルー Peru > リマ Lima
チリ Chile > サンティアゴ Santiago
イラン Iran > テヘラン Tehran
イラク Iraq > バグダッド Baghdad
モンゴル Mongolia > ウランバートル Ulaanbaatar
""")

ANTONYMS = _rows("""
大きい big > 小さい small
高い high > 低い low
長い long > 短い short
重い heavy > 軽い light
新しい new > 古い old
明るい bright > 暗い dark
暑い hot > 寒い cold
速い fast > 遅い slow
強い strong > 弱い weak
広い wide > 狭い narrow
深い deep > 浅い shallow
近い near > 遠い far
多い many > 少ない few
固い hard > 柔らかい soft
厚い thick > 薄い thin
甘い sweet > 苦い bitter
良い good > 悪い bad
安全 safe > 危険 dangerous
静か quiet > うるさい loud
簡単 easy > 難しい difficult
始まり beginning > 終わり end
朝 morning > 夜 night
上 up > 下 down
右 right > 左 left
前 front > 後ろ back
入口 entrance > 出口 exit
勝ち victory > 負け defeat
昨日 yesterday > 明日 tomorrow
""")

COLOURS = _rows("""
バナナ a_banana > 黄色 yellow
りんご an_apple > 赤 red
いちご a_strawberry > 赤 red
トマト a_tomato > 赤 red
きゅうり a_cucumber > 緑 green
草 grass > 緑 green
雪 snow > 白 white
牛乳 milk > 白 white
ご飯 rice > 白 white
空 the_sky > 青 blue
海 the_sea > 青 blue
炭 charcoal > 黒 black
カラス a_crow > 黒 black
みかん a_mandarin > オレンジ色 orange
にんじん a_carrot > オレンジ色 orange
ぶどう a_grape > 紫 purple
なす an_eggplant > 紫 purple
チョコレート chocolate > 茶色 brown
レモン a_lemon > 黄色 yellow
象 an_elephant > 灰色 grey
""")

KINDS = _rows("""
犬 a_dog > 動物 animal
猫 a_cat > 動物 animal
馬 a_horse > 動物 animal
牛 a_cow > 動物 animal
うさぎ a_rabbit > 動物 animal
すずめ a_sparrow > 鳥 bird
鳩 a_pigeon > 鳥 bird
わし an_eagle > 鳥 bird
鮭 a_salmon > 魚 fish
まぐろ a_tuna > 魚 fish
鯉 a_carp > 魚 fish
蝶 a_butterfly > 虫 insect
蜂 a_bee > 虫 insect
あり an_ant > 虫 insect
桃 a_peach > 果物 fruit
梨 a_pear > 果物 fruit
キャベツ a_cabbage > 野菜 vegetable
玉ねぎ an_onion > 野菜 vegetable
桜 a_cherry_tree > 木 tree
松 a_pine > 木 tree
ばら a_rose > 花 flower
ピアノ a_piano > 楽器 instrument
太鼓 a_drum > 楽器 instrument
電車 a_train > 乗り物 vehicle
自転車 a_bicycle > 乗り物 vehicle
""")

FAMILY = _rows("""
父の父 father's_father > 祖父 grandfather
母の父 mother's_father > 祖父 grandfather
父の母 father's_mother > 祖母 grandmother
母の母 mother's_mother > 祖母 grandmother
父の兄弟 father's_brother > おじ uncle
母の兄弟 mother's_brother > おじ uncle
父の姉妹 father's_sister > おば aunt
母の姉妹 mother's_sister > おば aunt
おじの子供 uncle's_child > いとこ cousin
おばの子供 aunt's_child > いとこ cousin
娘の息子 daughter's_son > 孫 grandchild
息子の娘 son's_daughter > 孫 grandchild
""")

WEEKDAYS: tuple[Word, ...] = (
    ("月曜日", "Monday"),
    ("火曜日", "Tuesday"),
    ("水曜日", "Wednesday"),
    ("木曜日", "Thursday"),
    ("金曜日", "Friday"),
    ("土曜日", "Saturday"),
    ("日曜日", "Sunday"),
)

# Months in figures would be arithmetic in Japanese (三月 is "third month"), so they are written in kanji.
MONTHS: tuple[Word, ...] = tuple(
    zip(
        ["一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月", "十一月", "十二月"],
        [
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ],
        strict=True,
    )
)
SEASONS = (("春", "spring"), ("夏", "summer"), ("秋", "autumn"), ("冬", "winter"))


def successors(cycle: tuple[Word, ...], step: int) -> tuple[tuple[Word, Word], ...]:
    return tuple((word, cycle[(i + step) % len(cycle)]) for i, word in enumerate(cycle))


def month_seasons() -> tuple[tuple[Word, Word], ...]:
    return tuple((month, SEASONS[(i - 2) % 12 // 3]) for i, month in enumerate(MONTHS))


_JA_TENS = ("", "十", "二十", "三十", "四十", "五十", "六十", "七十", "八十", "九十")
_JA_ONES = ("", "一", "二", "三", "四", "五", "六", "七", "八", "九")
_EN_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_EN_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_word(n: int) -> Word:
    """The words for 0 <= n < 100, e.g. (二十三, twenty-three).

    Raises:
        ValueError: n is outside that range.
    """
    if not 0 <= n < 100:
        raise ValueError(f"number_word: expected 0 <= n < 100, got {n}. Larger numbers have no words here.")
    ja = (_JA_TENS[n // 10] + _JA_ONES[n % 10]) or "零"
    en = _EN_ONES[n] if n < 20 else _EN_TENS[n // 10] + (f"-{_EN_ONES[n % 10]}" if n % 10 else "")
    return ja, en


NUMBER_WORDS = tuple(((str(n), str(n)), number_word(n)) for n in range(100))
PRODUCTS = tuple(((f"{a} × {b}",) * 2, (str(a * b),) * 2) for a in range(1, 10) for b in range(1, 10))
