/* Everything that the page says, in English and in Arabic. */
"use strict";

const plural = (language, forms) => (n, shown) => (forms[new Intl.PluralRules(language).select(n)] ?? forms.other).replace("#", shown);

const WORDS = {
  en: {
    direction: "ltr", other: "العربية", otherLabel: "بالعربية",
    title: "Give it a puzzle. Watch it think.",
    lead: (n) => `A network of ${n} numbers, small enough to live in this page. It runs on your device, offline; nothing you type leaves it.`,
    sudoku: (side) => `Sudoku ${side}×${side}`, maze: () => "Maze",
    solve: "Solve", stop: "Stop", fresh: "New puzzle", clear: "Clear", erase: "Erase",
    wall: "Walls", start: "Start", goal: "Goal",
    hint: { sudoku: "Type digits, move with the arrow keys, or paste a whole grid. Enter solves.", maze: "Draw walls with finger, mouse or space bar; drag start and goal. Enter solves." },
    loading: "Waking up…", ready: "Ready.", thinking: (k) => `Thinking, step ${k}…`,
    solved: (steps, ms) => `Solved in ${steps}`, took: (ms) => `${ms} ms of thinking`,
    unsolved: (steps) => `Unsolved: after ${steps}, no answer keeps the rules.`, attempts: "Its attempts are below; none is shown as an answer.",
    steps: plural("en", { one: "# step", other: "# steps" }),
    faults: {
      clash: "Two equal digits see each other. Change one of them.", none: "These digits leave no solution.", several: "This has more than one solution. Give more digits.",
      ends: "The maze needs a start and a goal.", blocked: "No way leads from start to goal. Open a wall.", text: "That is no grid of a size that lives here.", failed: "This browser cannot run the network.",
    },
    certainty: "How sure it is of the whole grid", halts: "enough to stop", notYet: "The network updates its whole answer again and again. Each step will appear here.",
    strip: "Steps", question: "Puzzle", step: (k) => `Step ${k}`, sure: (p) => `${p} sure`, changed: plural("en", { one: "# cell changed", other: "# cells changed" }),
    replay: "Play again", settings: "Settings", pace: "Pace", paces: { steps: "Step by step", instant: "At once" }, most: "Steps at most", digits: "Arabic-Indic digits", theme: "Light or dark",
    how: [["It guesses everything at once", "From the puzzle x it drafts a whole answer y, and keeps a thought z beside it."], ["It corrects itself", "The same two layers run again and again: the thought is updated several times, then the answer once."], ["It knows when to stop", "A second output says how sure it is. Rules, checked by this page, have the last word: no wrong answer is shown."]],
    facts: (parameters, weights, kilobytes) => `${parameters} parameters · ${weights} · ${kilobytes} kB`,
    licence: "Tafkir, Apache-2.0. Runs on ONNX Runtime Web, © Microsoft Corporation, MIT licence.",
    cell: (r, c, sign) => `Row ${r}, column ${c}: ${sign}`, emptyCell: "empty", signs: { "#": "wall", " ": "way", S: "start", G: "goal" }, board: "Puzzle",
  },
  ar: {
    direction: "rtl", other: "English", otherLabel: "In English",
    title: "أعطِها لغزًا، وشاهِدها تفكّر.",
    lead: (n) => `شبكة من ${n} عدد، صغيرة تسعها هذه الصفحة. تعمل على جهازك من دون إنترنت، ولا يغادره شيء مما تكتب.`,
    sudoku: (side) => `سودوكو ${side}×${side}`, maze: () => "متاهة",
    solve: "حُلَّ اللغز", stop: "قف", fresh: "لغز جديد", clear: "إفراغ", erase: "محو",
    wall: "جدران", start: "البداية", goal: "الهدف",
    hint: { sudoku: "اكتب الأرقام، وتنقّل بالأسهم، أو ألصق شبكة كاملة. مفتاح الإدخال يحلّ اللغز.", maze: "ارسم الجدران بالإصبع أو الفأرة أو مفتاح المسافة، واسحب البداية والهدف. مفتاح الإدخال يحلّ اللغز." },
    loading: "تستيقظ…", ready: "جاهزة.", thinking: (k) => `تفكّر، الخطوة ${k}…`,
    solved: (steps) => `حُلَّ في ${steps}`, took: (ms) => `${ms} م.ث من التفكير`,
    unsolved: (steps) => `لم يُحَل: بعد ${steps} لا جواب يوافق القواعد.`, attempts: "محاولاتها أدناه، ولا يُعرض أيّ منها جوابًا.",
    steps: plural("ar", { one: "خطوة واحدة", two: "خطوتين", few: "# خطوات", other: "# خطوة" }),
    faults: {
      clash: "رقمان متساويان يتعارضان. غيّر أحدهما.", none: "لا حلّ لهذه الأرقام.", several: "لهذا اللغز أكثر من حلّ. أضف أرقامًا.",
      ends: "تحتاج المتاهة إلى بداية وهدف.", blocked: "لا طريق من البداية إلى الهدف. افتح جدارًا.", text: "ليست هذه شبكة من مقاس تعرفه هذه الصفحة.", failed: "لا يستطيع هذا المتصفح تشغيل الشبكة.",
    },
    certainty: "يقينها من صحة الشبكة كلّها", halts: "ما يكفي للتوقف", notYet: "تُحدّث الشبكة جوابها كلّه مرة بعد مرة. ستظهر كل خطوة هنا.",
    strip: "الخطوات", question: "اللغز", step: (k) => `الخطوة ${k}`, sure: (p) => `يقين ${p}`, changed: plural("ar", { zero: "لم تتغيّر خلية", one: "تغيّرت خلية واحدة", two: "تغيّرت خليتان", few: "تغيّرت # خلايا", other: "تغيّرت # خلية" }),
    replay: "أعد العرض", settings: "الإعدادات", pace: "السرعة", paces: { steps: "خطوة خطوة", instant: "دفعة واحدة" }, most: "أقصى عدد للخطوات", digits: "الأرقام العربية المشرقية", theme: "فاتح أو داكن",
    how: [["تخمّن كل شيء معًا", "من اللغز x تصوغ مسودّة جواب كامل y، وتحتفظ إلى جانبه بفكرة z."], ["تصحّح نفسها", "الطبقتان نفسهما تعملان مرة بعد مرة: تُحدَّث الفكرة عدة مرات، ثم الجواب مرة واحدة."], ["تعرف متى تتوقف", "مخرج ثانٍ يقول كم هي متيقّنة. وللقواعد، التي تتحقق منها هذه الصفحة، الكلمة الأخيرة: لا يُعرض جواب خاطئ."]],
    facts: (parameters, weights, kilobytes) => `${parameters} مُعامِل · ${weights} · ${kilobytes} كيلوبايت`,
    licence: "تفكير، رخصة Apache-2.0. تعمل على ONNX Runtime Web، © Microsoft Corporation، رخصة MIT.",
    cell: (r, c, sign) => `الصف ${r}، العمود ${c}: ${sign}`, emptyCell: "فارغة", signs: { "#": "جدار", " ": "طريق", S: "البداية", G: "الهدف" }, board: "اللغز",
  },
};
