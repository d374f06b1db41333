//! The load of every expert as a picture: a row per sparse layer, a column per expert.

use std::fmt::Write;

use crate::model::Spread;

const CELL: usize = 24;
const LEFT: usize = 40;
const TOP: usize = 48;
/// Columns get narrower when there are more than fit into this.
const WIDEST: usize = 960;

/// An SVG document. White is an equal share; red has more of it, the darkest three times as much; blue has less, the
/// darkest nothing. The shares are the titles of the cells.
#[must_use]
pub fn heatmap(spreads: &[Spread]) -> String {
    let experts = spreads.iter().map(|spread| spread.load.len()).max().unwrap_or(0);
    let cell = (WIDEST / experts.max(1)).clamp(4, CELL);
    let (width, height) = ((LEFT + experts * cell + 8).max(340), TOP + spreads.len() * CELL + 8);
    let mut svg = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"4\" y=\"14\">share of each expert (columns) in each layer (rows);</text>\n\
         <text x=\"4\" y=\"28\">white: equal, red: more, blue: less</text>"
    );
    // As many numbers as have room beside each other.
    let every = (CELL / cell).max(1).next_power_of_two();
    for expert in (0..experts).step_by(every) {
        let x = LEFT + expert * cell + cell / 2;
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{expert}</text>", TOP - 4);
    }
    for (row, spread) in spreads.iter().enumerate() {
        let y = TOP + row * CELL;
        let (x, middle) = (LEFT - 6, y + CELL / 2 + 4);
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{middle}\" text-anchor=\"end\">{}</text>", spread.layer);
        for (expert, share) in spread.load.iter().enumerate() {
            let (x, fill) = (LEFT + expert * cell, colour(share * spread.load.len() as f64));
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{cell}\" height=\"{CELL}\" fill=\"{fill}\" stroke=\"#fff\" \
                 stroke-width=\"0.5\"><title>layer {}, expert {expert}: {:.2}%</title></rect>",
                spread.layer,
                100.0 * share
            );
        }
    }
    svg + "</svg>\n"
}

/// The colour of a share `times` an equal one.
fn colour(times: f64) -> String {
    const WHITE: [f64; 3] = [247.0, 247.0, 247.0];
    const RED: [f64; 3] = [178.0, 24.0, 43.0];
    const BLUE: [f64; 3] = [33.0, 102.0, 172.0];
    let (end, far) =
        if times >= 1.0 { (RED, ((times - 1.0) / 2.0).min(1.0)) } else { (BLUE, 1.0 - times.max(0.0)) };
    let [r, g, b] = [0, 1, 2].map(|i| (WHITE[i] + far * (end[i] - WHITE[i])).round() as u8);
    format!("#{r:02x}{g:02x}{b:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_go_from_blue_over_white_to_red() {
        assert_eq!(
            [0.0, 1.0, 2.0, 3.0, 9.0].map(colour),
            ["#2166ac", "#f7f7f7", "#d58891", "#b2182b", "#b2182b"]
        );
    }

    #[test]
    fn a_picture_has_a_cell_for_each_expert_and_every_element_ends() {
        for experts in [4usize, 64, 512] {
            let spreads = [Spread::of(1, &vec![3; experts], 0), Spread::of(2, &vec![5; experts], 0)];
            let svg = heatmap(&spreads);
            assert_eq!(svg.matches("<title>").count(), 2 * experts);
            for name in ["svg", "text", "title"] {
                let (open, close) = (format!("<{name}"), format!("</{name}>"));
                assert_eq!(svg.matches(&open).count(), svg.matches(&close).count(), "{name}");
            }
            let rects = svg.matches("<rect").count();
            assert_eq!(rects, svg.matches("</rect>").count() + 1, "one has no title");
            assert_eq!(svg.matches('"').count() % 2, 0);
        }
    }
}
