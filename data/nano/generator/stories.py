"""Short plain stories, sentence by sentence in both languages, so that the models read more than questions."""

from __future__ import annotations

from random import Random

from generator.facts import MONTHS, SEASONS, WEEKDAYS, Word
from generator.parallel import LANGUAGES, join
from generator.reasoning import NAMES

PLACES: tuple[Word, ...] = (
    ("公園", "the park"),
    ("図書館", "the library"),
    ("市場", "the market"),
    ("駅", "the station"),
    ("学校", "the school"),
    ("海", "the sea"),
    ("山", "the mountains"),
    ("動物園", "the zoo"),
    ("美術館", "the museum"),
    ("川", "the river"),
)
WEATHER: tuple[Word, ...] = (
    ("空は晴れていました。", "The sky was clear."),
    ("雨が静かに降っていました。", "It was raining quietly."),
    ("朝から雪が降りました。", "It had snowed since the morning."),
    ("風が強い日でした。", "It was a windy day."),
    ("少し曇っていました。", "It was a little cloudy."),
    ("とても暑い日でした。", "It was a very hot day."),
)
OPENINGS: tuple[Word, ...] = (
    ("{day}、{name}は{place}へ行きました。", "On {day}, {name} went to {place}."),
    ("{month}のある日、{name}は{place}にいました。", "One day in {month}, {name} was at {place}."),
    (
        "{season}の朝、{name}は{friend}と{place}を歩きました。",
        "One {season} morning, {name} walked at {place} with {friend}.",
    ),
    ("{name}は{place}が好きで、{day}にはいつもそこにいます。", "{name} likes {place} and is always there on {day}."),
)
EVENTS: tuple[Word, ...] = (
    ("{name}は小さい犬を見ました。", "{name} saw a small dog."),
    ("{friend}が後から来ました。", "{friend} came later."),
    ("二人は新しい本の話をしました。", "The two talked about a new book."),
    ("{name}は赤いりんごを買いました。", "{name} bought a red apple."),
    ("{friend}は白い花の絵をかきました。", "{friend} painted a white flower."),
    ("遠くで電車の音が聞こえました。", "The sound of a train came from far away."),
    ("木の上で鳥が歌っていました。", "A bird was singing in a tree."),
    ("{name}は温かいお茶を飲みました。", "{name} drank warm tea."),
    ("{friend}は古い歌を歌いました。", "{friend} sang an old song."),
    ("{name}は母に手紙を書きました。", "{name} wrote a letter to mother."),
    ("子供たちが元気に走っていました。", "Children were running happily."),
    ("{name}は長い道をゆっくり歩きました。", "{name} walked slowly along a long road."),
    ("先生が世界の国について話しました。", "The teacher spoke about the countries of the world."),
    ("{friend}は問題の答えを考えていました。", "{friend} was thinking about the answer to a problem."),
)
ENDINGS: tuple[Word, ...] = (
    ("夜、{name}は家に帰りました。", "At night {name} went home."),
    ("{name}は楽しい一日だったと思いました。", "{name} thought that it had been a good day."),
    ("また行きたいと{name}は言いました。", "{name} said that they wanted to go again."),
    ("{friend}と{name}は明日も会います。", "{friend} and {name} will meet again tomorrow."),
)


def story(rng: Random) -> dict[str, str]:
    """A story of four to eight sentences, the same in both languages."""
    (name, friend), place = rng.sample(NAMES, 2), rng.choice(PLACES)
    words = {
        "name": name,
        "friend": friend,
        "place": place,
        "day": rng.choice(WEEKDAYS),
        "month": rng.choice(MONTHS),
        "season": rng.choice(SEASONS),
    }
    sentences = [rng.choice(OPENINGS), rng.choice(WEATHER)]
    sentences += rng.sample(EVENTS, rng.randint(1, 5))
    sentences += [rng.choice(ENDINGS)]
    return {
        lang: join(lang, [said[i].format(**{k: word[i] for k, word in words.items()}) for said in sentences])
        for i, lang in enumerate(LANGUAGES)
    }
