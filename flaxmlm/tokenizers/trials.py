"""Lines that a tokenizer and its exported form are compared on.

Real text of the caller and sentences in many scripts; and the same lines with
odd things in them: masks, runs of white space, control characters,
compatibility characters, unknown ones, very long words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

CHINESE = """\
北京的秋天很短，树叶黄了没几天，风一吹就落满了院子。
他每天早上六点起床，先喝一杯温水，再去河边跑步。
这本书讲的是一个小镇的故事，作者在那里住了二十年。
我们坐火车去上海，路上一共用了四个半小时。
妈妈问：“你晚上想吃什么？”我说随便，她笑了。
如果明天下雨，比赛就改到星期天下午举行。
图书馆在学校的东边，旁边有一家卖面条的小店。
科学家发现，这种鱼可以在零下两度的水里生活。
手机没电了，我只好向路人打听去车站的路。
数据库升级以后，查询速度比原来快了3.5倍。
春节期间，高速公路上的汽车排成了长龙。
老师让学生把文章读三遍，然后写下自己的感想。
公司决定从2024年起，把总部搬到深圳。
爷爷说，年轻的时候他最喜欢听收音机里的评书。
医生检查了病人的心脏，认为没有大问题。
这座桥建于清朝，全长一百二十米，至今还在使用。
窗外的雪越下越大，屋里的火炉烧得正旺。
请先阅读说明书，再打开电源开关（红色按钮）。
市场上的蔬菜涨价了，白菜每斤卖到两块五。
她用Python写了一个程序，自动整理硬盘上的照片。
历史学家对这个问题有不同的看法，争论持续了几十年。
孩子们在沙滩上堆城堡，浪来了，城堡就塌了。
根据《劳动法》第四十四条，加班应当支付工资。
飞机晚点了两个小时，旅客们在大厅里等得很着急。
月亮升起来的时候，村子里已经没有人走动。
这道菜要先用小火煮，等汤变白了再放盐……
他的普通话带一点四川口音，听起来很亲切！
研究表明，每天睡七个小时的人记忆力更好。
警察沿着脚印一直找到山脚下，可是什么也没发现。
“时间不早了，”他站起来说，“我们明天再谈吧。”
網路上的消息真假難辨，讀者應該自己判斷。
臺灣的夜市很熱鬧，到處都是小吃的香味。
""".splitlines()

OTHERS = """\
昨日、友達と一緒に映画を見に行きました。とても面白かったです。
コンピューターの電源を入れて、ファイルを開いてください。
오늘은 날씨가 좋아서 공원에서 점심을 먹었습니다.
서울에서 부산까지 기차로 세 시간쯤 걸린다.
Вчера вечером мы долго гуляли по набережной и говорили о книгах.
Ёлка стоит в углу, а под ней — подарки для всей семьи.
Ο άνθρωπος που συναντήσαμε χθες μένει στη Θεσσαλονίκη.
في الصباح شربت القهوة وقرأت الجريدة قبل أن أذهب إلى العمل.
هذِهِ جُمْلَةٌ بِالتَّشْكِيلِ.
הילדים שיחקו בגן עד שהחשיך, ואז חזרו הביתה.
मैं कल सुबह दिल्ली से मुंबई जाने वाली गाड़ी पकड़ूँगा।
ফুলগুলো জানালার পাশে রোদে শুকিয়ে গেছে।
நான் தினமும் காலையில் தேநீர் குடிப்பேன்.
เมื่อวานนี้ฉันไปตลาดกับแม่และซื้อผลไม้มากมาย
Quán cà phê ở góc phố mở cửa từ sáng sớm đến tối muộn.
Der Fußgänger überquerte die Straße, ohne auf die Ampel zu achten.
L'été dernier, nous avons loué une maison près de la forêt à Noël.
¿Dónde está el año nuevo? ¡Mañana por la mañana lo sabrás!
İstanbul'da ılık bir akşam, ışıklar Boğaz'a düşüyordu.
Żółw powoli przeszedł przez jezdnię i zniknął w trawie.
Příliš žluťoučký kůň stál u řeky a čekal na déšť.
Ég veit ekki hvað þú átt við, en það er í lagi.
Bokmål og nynorsk er to skriftspråk; æ, ø og å står sist i alfabetet.
ქართული ანბანი ოცდაცამეტი ასოსგან შედგება.
Հայերեն գիրքը սեղանի վրա է։
መጽሐፉ ጠረጴዛው ላይ ነው።
See you at 5 👋🏽 — 👩‍👩‍👧 are coming too 🎉🎉 (¯\\_(ツ)_/¯)
∀x ∈ ℝ: ∑ᵢ xᵢ² ≥ 0, ∫₀¹ f(x) dx ≤ ½ ± 3 µm, 25 °C → 77 °F
""".splitlines()

_WHITE = " \t\u00a0\u3000\u2003\u200b\u2028\x0b\x1c\x85"
_CONTROL = "\x00\x01\x08\x1b\x7f\u00ad\ufeff\u200d\u202e"
_RARE = [
  *("ﬁ", "ﬂ", "½", "①", "２", "Ａｂ", "Ⅳ", "㎏", "℃", "…", "‥", "ſ", "İ"),
  *("Σ", "ς", "ß", "ẞ", "\u212b", "e\u0301", "E\u0301", "N\u0303"),
  *("\u1100\u1161\u11a8", "ｶﾞ", "𝔄", "🤷", "\U0010fffd", "\ue123"),
  *("▁", "Ġ", "##", "@@"),
]


def make_lines(
  texts: Mapping[str, Sequence[str]],
  *,
  count: int,
  seed: int,
  without: Sequence[str],
) -> tuple[list[str], dict[str, int]]:
  """Draws lines: 70 % from texts, the rest in Chinese and other scripts.

  Args:
    texts: Lines by where they come from; each gives the same share, as far as
      it has lines.
    count: Lines to return.
    seed: The same seed and texts give the same lines.
    without: A line that has one of these is not drawn.

  Returns:
    The lines, and how many of them come from where.
  """
  draw = random.Random(seed)
  result: list[str] = []
  counts: dict[str, int] = {}
  left = count * 7 // 10
  for number, name in enumerate(
    sorted(texts, key=lambda name: len(texts[name]))
  ):
    some = [t for t in texts[name] if not any(w in t for w in without)]
    counts[name] = min(left // (len(texts) - number), len(some))
    result += draw.sample(some, counts[name])
    left -= counts[name]
  left = count - len(result)
  counts |= {"in Chinese": left - left // 4, "in other scripts": left // 4}
  clauses = [
    c for s in CHINESE for c in re.findall(r".+?[，。：；！？…]+|.+", s)
  ]
  for _ in range(counts["in Chinese"]):
    result.append("".join(draw.choices(clauses, k=draw.randint(1, 6))))
  for _ in range(counts["in other scripts"]):
    result.append(" ".join(draw.choices(OTHERS, k=draw.randint(1, 2))))
  return result, counts


def disturb(lines: Sequence[str], *, count: int, seed: int) -> list[str]:
  """Returns some lines with odd things put into them; see the module."""
  draw = random.Random(seed)
  return [_disturb(line, draw) for line in draw.sample(lines, count)]


def _disturb(line: str, draw: random.Random) -> str:
  words = line.split(" ")
  place = draw.randrange(len(words))
  match draw.randrange(8):
    case 0:
      words[place] = "[MASK]"
    case 1:
      words[place] += draw.choice(["[MASK]", " [MASK].", "[MASK]s", " [MASK] "])
    case 2:
      words[place] += "".join(draw.choices(_WHITE, k=draw.randint(2, 5)))
    case 3:
      words[0] = draw.choice(["  ", "\t", "\u00a0", "▁"]) + words[0]
      words[-1] += draw.choice(["  ", "\t", "\u3000 ", "▁"])
    case 4:
      words[place] += draw.choice(_CONTROL) + words[-1]
    case 5:
      words[place] += "".join(draw.choices(_RARE, k=draw.randint(1, 4)))
    case 6:
      words[place] = "".join(words) * draw.randint(1, 20)
    case 7:
      words[place] += draw.choice("=-#.0x~ ") * draw.randint(3, 120)
  return " ".join(words)
